"use strict";
const large = document.getElementById("large");
const image = large.querySelector("img");
for (const zoom of document.querySelectorAll(".zoom")) {
  zoom.addEventListener("click", () => {
    const small = zoom.querySelector("img");
    image.src = small.src;
    image.alt = small.alt;
    image.className = small.className;
    const wide = small.naturalWidth;  // as wide as the window; on a phone as wide as it is, to be moved about
    image.style.width = small.classList.contains("pixels") ? "" : `max(min(92vw, ${1.5 * wide}px), min(${wide}px, 56rem))`;
    large.querySelector("p").textContent = zoom.dataset.caption;
    large.showModal();
    large.scrollTo(0, 0);
  });
}
large.addEventListener("click", () => large.close());
function unfold() {  // a link to folded settings opens them
  const target = location.hash && document.getElementById(location.hash.slice(1));
  if (target && target.tagName === "DETAILS") target.open = true;
}
window.addEventListener("hashchange", unfold);
unfold();
