"""Learned tokens: every common file layout is read, diffusers reads ours, and nothing else in a pipeline changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_pipeline import WIDTH, save_pipeline
from torch import nn

from concepts.embeddings import (
    encode,
    file_of,
    find_vectors,
    install,
    read_vectors,
    require_token,
    save_vectors,
    tokenize,
    tokens_in,
)
from concepts.stable_diffusion import load_pipeline
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


@pytest.mark.parametrize("token", ["new1", "<new 1>", "<>", "<a/b>", "<a><b>"])
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
    vectors = find_vectors(["<new2>", "<absent>"], [tmp_path])
    assert list(vectors) == ["<new2>"]
    assert torch.equal(vectors["<new2>"], ROWS + 1)
    assert list(load_file(tmp_path / "learned_new1.safetensors")) == ["<new1>"]


def test_the_first_folder_with_a_token_counts(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 2.0)):
        save_vectors(tmp_path / name / "x.safetensors", "<new1>", torch.full((1, 4), value), "test")
    assert find_vectors(["<new1>"], [tmp_path / "b", tmp_path / "a"])["<new1>"].mean() == 2


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
    assert tokenize(pipe, ["red " * 100]).shape == (1, 77)
    assert "cut at 77" in capsys.readouterr().err


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
