"""Learned tokens: every common file layout is read, diffusers reads ours, and nothing else in a pipeline changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from small_pipeline import WIDTH, save_pipeline
from torch import nn

from concepts.embeddings import (
    add_names,
    encode,
    file_of,
    find_vectors,
    install,
    log_plain_text,
    read_vectors,
    require_known,
    require_token,
    save_vectors,
    tokenize,
    tokens_in,
)
from concepts.single_file import make_tokenizer
from concepts.stable_diffusion import load_pipeline, load_tokenizer
from runtime.cli import BadInput

CPU = torch.device("cpu")
ROWS = torch.arange(2 * WIDTH).reshape(2, WIDTH).float() / WIDTH


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_pipeline(tmp_path_factory.mktemp("model")))


def pipeline(model: str) -> Any:
    return load_pipeline(model, CPU, torch.float32)


def test_tokens_are_found_in_prompts() -> None:
    assert tokens_in("a <new1>, a <cat-toy>. in the style of <new1>; 1 < 2 > 0") == ["<new1>", "<cat-toy>"]


@pytest.mark.parametrize("token", ["new1", "<new 1>", "<>", "<a/b>", "<a><b>", "<3>", "<..>", f"<{'a' * 300}>"])
def test_other_words_are_refused_as_tokens(token: str) -> None:
    with pytest.raises(BadInput, match="--token"):
        require_token(token, "--token")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("learned_embeds.bin", {"<new1>": ROWS}),
        ("learned_new1.pt", ROWS),
        ("new1.ckpt", {"string_to_token": {"*": 265}, "string_to_param": {"*": ROWS}, "name": "placeholder"}),
        ("new1.pt", {"string_to_token": {"*": 9}, "string_to_param": nn.ParameterDict({"*": nn.Parameter(ROWS)})}),
        ("any.pt", {"string_to_param": {"*": ROWS}, "name": "<new1>"}),
        ("new1.bin", {"emb_params": ROWS}),
    ],
)
def test_every_layout_is_read(tmp_path: Path, name: str, content: Any) -> None:
    torch.save(content, tmp_path / name)
    vectors = read_vectors(tmp_path / name)
    assert list(vectors) == ["<new1>"]
    assert torch.equal(vectors["<new1>"], ROWS)
    assert not vectors["<new1>"].requires_grad


def test_a_single_vector_may_lack_its_first_dimension(tmp_path: Path) -> None:
    torch.save({"<new1>": ROWS[0].half()}, tmp_path / "a.bin")
    vectors = read_vectors(tmp_path / "a.bin")["<new1>"]
    assert vectors.shape == (1, WIDTH)
    assert vectors.dtype == torch.float32


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"<new1>": torch.zeros(2, 3, 4)}, "no embedding"),
        ({"clip_g": torch.zeros(2, 1280), "clip_l": torch.zeros(2, 768)}, "Stable Diffusion XL"),
        ({"<new1>": torch.full((1, 4), torch.nan)}, "NaN"),
        ({"<new1>": torch.zeros(1, 4, dtype=torch.long)}, "no embedding"),
        ({"<new1>": torch.zeros(0, 4)}, "no embedding"),
        ({"a": torch.zeros(4), "b": torch.zeros(4)}, "no token"),
        ([1, 2], "no embedding"),
        ({}, "no embedding"),
    ],
)
def test_other_content_is_refused_with_the_file(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(BadInput, match=rf"x\.pt.*{message}"):
        read_vectors(tmp_path / "x.pt")


def test_saved_vectors_are_loaded_by_token(tmp_path: Path) -> None:
    save_vectors(file_of(tmp_path, "<new1>"), "<new1>", ROWS, "test")
    save_vectors(file_of(tmp_path, "<new2>"), "<new2>", ROWS + 1, "test")
    vectors = find_vectors(["<new2>", "<absent>"], [tmp_path]).vectors
    assert list(vectors) == ["<new2>"]
    assert torch.equal(vectors["<new2>"], ROWS + 1)
    assert list(load_file(tmp_path / "learned_new1.safetensors")) == ["<new1>"]


def test_the_first_folder_with_a_token_counts(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 2.0)):
        save_vectors(tmp_path / name / "x.safetensors", "<new1>", torch.full((1, 4), value), "test")
    assert find_vectors(["<new1>"], [tmp_path / "b", tmp_path / "a"]).vectors["<new1>"].mean() == 2


@pytest.mark.parametrize(
    ("name", "token"),
    [
        ("猫1.pt", "<猫1>"),
        ("кот.pt", "<кот>"),
        ("cafe\u0301.pt", "<café>"),  # as macOS writes an accent
        ("EasyNegative v2.pt", "<EasyNegativev2>"),
        ("learned_cat-toy.PT", "<cat-toy>"),
    ],
)
def test_a_file_without_a_token_has_the_one_of_its_name_in_any_script(tmp_path: Path, name: str, token: str) -> None:
    torch.save(ROWS, tmp_path / name)
    assert list(find_vectors([token], [tmp_path]).vectors) == [token]


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["learned_embeds-steps-1000.bin", "learned_embeds.bin"], "learned_embeds.bin"),
        (["a.bin", "learned_embeds.bin", "learned_new1.safetensors"], "learned_new1.safetensors"),
        (["learned_embeds-steps-1000.bin", "learned_embeds-steps-500.bin"], None),
        (["learned_embeds.bin", "learned_embeds.safetensors"], None),
    ],
)
def test_the_final_file_of_a_token_counts_and_others_are_ambiguous(
    tmp_path: Path, names: list[str], chosen: str | None
) -> None:
    for index, name in enumerate(names):
        write: Any = save_file if name.endswith(".safetensors") else torch.save
        write({"<new1>": ROWS + index}, tmp_path / name)
    if chosen:
        search = find_vectors(["<new1>"], [tmp_path])
        assert search.files == {"<new1>": tmp_path / chosen}
        assert torch.equal(search.vectors["<new1>"], ROWS + names.index(chosen))
        return
    with pytest.raises(BadInput, match=f"<new1> differs between {', '.join(names)}"):
        find_vectors(["<new1>"], [tmp_path])
    assert not find_vectors(["<new2>"], [tmp_path]).vectors


def test_equal_copies_of_a_token_are_not_ambiguous(tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        torch.save({"<new1>": ROWS}, tmp_path / name)
    assert find_vectors(["<new1>"], [tmp_path]).files == {"<new1>": tmp_path / "a.pt"}


def test_a_file_of_a_folder_stops_only_who_needs_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_vectors(file_of(tmp_path, "<new1>"), "<new1>", ROWS, "test")
    torch.save({"clip_g": torch.zeros(2, 1280), "clip_l": torch.zeros(2, 768)}, tmp_path / "xl.pt")
    (tmp_path / "learned_new2.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    (tmp_path / "._learned_new1.safetensors").write_bytes(b"macOS")
    (tmp_path / "folder.pt").mkdir()
    assert torch.equal(find_vectors(["<new1>"], [tmp_path]).vectors["<new1>"], ROWS)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.endswith(": skipped") for line in lines)
    for needed, place in (("<new2>", tmp_path), ("<new1>", tmp_path / "xl.pt")):
        with pytest.raises(BadInput, match=r"learned_new2|xl\.pt"):
            find_vectors([needed], [place])


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--embeddings"):
        find_vectors(["<new1>"], [tmp_path / "absent"])


@pytest.mark.parametrize("vectors", [1, 2])
def test_diffusers_reads_what_is_saved_and_encodes_alike(tmp_path: Path, model: str, vectors: int) -> None:
    path = file_of(tmp_path, "<new1>")
    save_vectors(path, "<new1>", ROWS[:vectors], "test")
    ours, theirs = pipeline(model), pipeline(model)
    install(ours, read_vectors(path))
    theirs.load_textual_inversion(str(tmp_path), weight_name=path.name)
    prompt = "a photo of a <new1> on a red background."
    expected = theirs.encode_prompt(prompt, CPU, 1, False)[0]
    assert torch.equal(encode(ours, [prompt]), expected)
    assert not torch.equal(expected, theirs.encode_prompt(prompt.replace("<new1>", "star"), CPU, 1, False)[0])


def test_installing_changes_no_other_tensor(model: str) -> None:
    before, after = pipeline(model), pipeline(model)
    old = len(before.tokenizer)
    install(after, {"<new1>": ROWS, "<new2>": ROWS[:1] + 3})
    for part in ("unet", "vae", "text_encoder"):
        new = getattr(after, part).state_dict()
        for name, tensor in getattr(before, part).state_dict().items():
            assert torch.equal(tensor, new[name][:old] if "token_embedding" in name else new[name])
    table = after.text_encoder.get_input_embeddings().weight
    assert torch.equal(table[old:], torch.cat([ROWS, ROWS[:1] + 3]))
    assert not table.requires_grad


def test_vectors_of_another_model_are_refused_before_anything_is_added(model: str) -> None:
    pipe = pipeline(model)
    old = len(pipe.tokenizer)
    with pytest.raises(BadInput, match="768 wide"):
        install(pipe, {"<new1>": ROWS, "<new2>": torch.zeros(1, 768)})
    assert len(pipe.tokenizer) == old


def test_a_token_that_is_there_already_is_refused(model: str) -> None:
    pipe = pipeline(model)
    install(pipe, {"<new1>": ROWS})
    with pytest.raises(BadInput, match="<new1> is in the model's vocabulary"):
        install(pipe, {"<new1>": ROWS})


def test_a_prompt_that_is_too_long_is_cut_with_a_line(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = pipeline(model)
    assert tokenize(pipe.tokenizer, ["red " * 75 + "blue star"]).shape == (1, 77)
    line = capsys.readouterr().err
    assert "prompt of 79 tokens is cut at 77" in line
    assert line.endswith("cut off: blue star\n")


# ---------------------------------------------------------------- from a token's name to its ids

TOKENS = {"<Fish>": 3, "<Dog>": 1, "<dog>": 2, "<DOG>": 1, "<猫>": 2, "<café>": 1, "<new1>": 12, "<80s-anime>": 1}


@pytest.mark.parametrize("vocabulary", ["miniature", "Stable Diffusion v1"])
def test_every_token_is_read_as_its_vectors_in_every_place(model: str, vocabulary: str) -> None:
    tokenizer = make_tokenizer() if vocabulary != "miniature" else load_tokenizer(model)
    assert tokenizer is not None
    first = len(tokenizer)
    add_names(tokenizer, TOKENS)
    for token, vectors in TOKENS.items():
        own = list(range(first, first := first + vectors))
        for text in ("a photo of a {}.", "{}", "({}),{}!", "A {}'s BENCH", "x{}y", "{}_1 {}0 {}_10"):
            ids = tokenize(tokenizer, [text.replace("{}", token)])[0].tolist()
            learned = [index for index in ids if index >= len(tokenizer) - sum(TOKENS.values())]
            assert learned == own * text.count("{}"), (token, text)
    assert tokenize(tokenizer, ["a <cafe\u0301>"]).tolist() == tokenize(tokenizer, ["a <café>"]).tolist()


def test_a_token_that_the_tokenizer_reads_as_another_is_named(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with names that are looked up in lower-cased text."""
    real = tokenizers.AddedToken
    monkeypatch.setattr("tokenizers.AddedToken", lambda name, normalized: real(name, normalized=True))
    tokenizer = pipeline(model).tokenizer
    with pytest.raises(BadInput, match=r"token <(dog|Dog)>: the model's tokenizer reads <\1> as something else"):
        add_names(tokenizer, {"<dog>": 1, "<Dog>": 1})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a <nothing>", "<nothing> in 'a <nothing>': no such token"),
        ("a <New1>", "<New1>"),  # another case is another token
        ("a <new1>, <cat-toy>", "<cat-toy> in"),
        ("a <猫>", "<猫>"),
        ("a house <lora:foo:0.8>", "<lora:foo:0.8> in .*LoRAs are not supported"),
    ],
)
def test_a_text_with_an_unknown_token_is_never_encoded(model: str, text: str, message: str) -> None:
    pipe = pipeline(model)
    install(pipe, {"<new1>": ROWS})
    with pytest.raises(BadInput, match=message):
        encode(pipe, ["a <new1>", text])


@pytest.mark.parametrize("text", ["a <3 b", "1 < 2 > 0", "I <3> you", "a <new1> <- <> -> b", "a < b >", "<new 1>"])
def test_other_brackets_are_text(model: str, text: str) -> None:
    pipe = pipeline(model)
    install(pipe, {"<new1>": ROWS})
    assert encode(pipe, [text]).shape == (1, 77, WIDTH)


def test_a_file_with_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"<new1>": Evil()}, tmp_path / "x.pt")
    with pytest.raises(BadInput, match="refused"):
        read_vectors(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    save_file({"<new1>": ROWS}, tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(content[:-9])
    with pytest.raises(BadInput, match="truncated"):
        read_vectors(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a <new1:0.8> b", "<new1:0.8>"), (r"a \<new1\> b", r"<new1\>"), ("a &lt;new1&gt;", "&lt;new1&gt;"),
        ("a ＜new1＞", "＜new1＞"), ("a < new1>", "< new1>"), ("embedding:new1, a b", "embedding:new1"),
    ],
)  # fmt: skip
def test_what_is_meant_as_a_token_is_named(text: str, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    log_plain_text([text], ["<new1>"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{part} is read as text")
    assert line.endswith("did you mean <new1>?")


@pytest.mark.parametrize("text", ["a <new1>", "a <3 b", "a < b and c > d", "1 < 2 > 0", "(a, b)"])
def test_ordinary_text_is_no_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    log_plain_text([text], ["<new1>"])
    assert not capsys.readouterr().err


def test_a_text_that_is_not_utf_8_is_named() -> None:
    with pytest.raises(BadInput, match=r"^--negative: 'a \\udcff b': a text in UTF-8 is needed"):
        require_known(["a 猫", b"a \xff b".decode(errors="surrogateescape")], [], "--negative: ")
