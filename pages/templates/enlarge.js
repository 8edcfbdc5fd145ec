"use strict";
const large = document.getElementById("large");
const picture = large.querySelector("img");
for (const zoom of document.querySelectorAll(".zoom")) {
  zoom.addEventListener("click", () => {
    const small = zoom.querySelector("img");
    picture.src = small.src;
    picture.alt = small.alt;
    picture.className = small.className;
    large.querySelector("p").textContent = zoom.dataset.caption;
    large.showModal();
  });
}
large.addEventListener("click", () => large.close());
