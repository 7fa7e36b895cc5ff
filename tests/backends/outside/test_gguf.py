"""GGUF files as a base: what a plan reads of them, what they become, what is wrong with them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.backends.checkpoint_source import ends_of, find_checkpoint, token_conflict
from posttrain.backends.outside import gguf as outside
from posttrain.backends.outside.gguf import gguf_of, known_families, read_head
from posttrain.engine.errors import ConfigError
from posttrain.engine.store import Store
from posttrain.language.loader import load_recipe

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

HEADS, KV_HEADS, WIDTH = 4, 2, 64
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk",
}
Write = Callable[..., Path]


def tokens() -> list[str]:
    """The 256 bytes as GPT-2 writes them, one merge, and what begins and ends a turn."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return [*bytes_to_unicode().values(), "ab", "<|im_start|>", "<|im_end|>"]


def turned(weight: Any, heads: int) -> Any:
    """Rows of queries and keys in the order of llama.cpp: the halves of a head interleaved."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(tied, blocks)`: a random llama of two layers, and the state dict it was written from
    in `write.state`; with `blocks` its matrices are of the type Q8_0."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def write(*, tied: bool = True, blocks: bool = False, name: str = "tiny.gguf") -> Path:
        words = tokens()
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(words), hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=128,
            rms_norm_eps=1e-5, tie_word_embeddings=tied, initializer_range=0.3,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        path = tmp_path / name
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_name("tiny")
        writer.add_license("apache-2.0")
        writer.add_context_length(128)
        writer.add_embedding_length(WIDTH)
        writer.add_block_count(2)
        writer.add_feed_forward_length(96)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(10000.0)
        writer.add_vocab_size(len(words))
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(words)
        writer.add_token_types([1] * (len(words) - 2) + [3, 3])
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(len(words) - 2)
        writer.add_eos_token_id(len(words) - 1)
        writer.add_chat_template(TEMPLATE)
        state = {k: v.clone() for k, v in model.state_dict().items() if v.ndim}
        for key, tensor in state.items():
            if key == "lm_head.weight" and tied:
                continue
            theirs, weight = key, tensor.numpy()
            for ours, other in NAMES.items():
                theirs = theirs.replace(ours, other)
            if "q_proj" in key or "k_proj" in key:
                weight = turned(weight, HEADS if "q_proj" in key else KV_HEADS)
            if blocks and weight.ndim > 1:
                kind = gguf.GGMLQuantizationType.Q8_0
                weight = gguf.quants.quantize(weight, kind)
                writer.add_tensor(theirs, weight, raw_dtype=kind)
            else:
                writer.add_tensor(theirs, weight)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        write.state = state  # type: ignore[attr-defined]
        return path

    return write


def made(path: Path, store: Path) -> Path:
    """The artifact that a recipe with this base makes."""
    from posttrain.engine.planner import plan
    from posttrain.engine.provenance import Provenance
    from posttrain.engine.runner import run
    from posttrain.stages import worker

    recipe = store.parent / "only_base.py"
    recipe.write_text("def recipe(r, base):\n    return r.model(base)\n")
    place = Store(store)
    loaded = load_recipe(str(recipe), store=place, settings=[f"base={path}"])
    for _ in run(loaded.graph, place, execute=worker.EXECUTE, provenance=Provenance(), jobs=1):
        pass
    (row,) = plan(loaded.graph, place)
    assert row.artifact is not None
    return row.artifact.path


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own head"])
def test_plain_numbers_become_the_same_model(write: Write, tmp_path: Path, tied: bool) -> None:
    import torch

    from posttrain.backends.checkpoint import load
    from posttrain.backends.gguf_convert import convert

    (tmp_path / "out").mkdir()
    assert convert(write(tied=tied), tmp_path / "out") > 0
    found = load(tmp_path / "out")
    state = write.state  # type: ignore[attr-defined]
    ours = found.model.state_dict()
    assert ours.keys() == state.keys()
    assert all(torch.equal(ours[key].float(), state[key]) for key in state)
    embedding, head = found.model.get_input_embeddings(), found.model.get_output_embeddings()
    assert (embedding.weight is head.weight) == tied
    assert found.tokenizer.decode(found.tokenizer("abc <|im_end|>")["input_ids"]).startswith("abc")
    assert found.stop_ids == (len(tokens()) - 1,)


def test_blocks_become_bfloat16(write: Write, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    from posttrain.backends.gguf_convert import convert

    out = tmp_path / "out"
    convert(write(blocks=True), out)
    saved = load_file(out / "model.safetensors")
    down = saved["model.layers.1.mlp.down_proj.weight"]
    expected = write.state["model.layers.1.mlp.down_proj.weight"]  # type: ignore[attr-defined]
    kind = gguf.GGMLQuantizationType.Q8_0
    once = gguf.quants.dequantize(gguf.quants.quantize(expected.numpy(), kind), kind)
    assert down.dtype == torch.bfloat16
    assert torch.equal(down, torch.from_numpy(once).to(torch.bfloat16))
    config = json.loads((out / "config.json").read_text())
    assert not {"_model_name_or_path", "quantization_config"} & config.keys()


def test_it_is_converted_once_by_its_bytes(write: Write, tmp_path: Path) -> None:
    path = write()
    store = tmp_path / "store"
    first = made(path, store)
    record = json.loads((first / "record.json").read_text())
    digest = find_checkpoint(path).sha256
    assert record["payload"]["data"] == {"gguf": digest}
    assert record["provenance"]["origin"]["gguf"] == digest
    # By another name, and as the only weights of a directory.
    (tmp_path / "other").mkdir()
    moved = path.rename(tmp_path / "other" / "renamed.gguf")
    assert made(moved.parent, store) == first
    moved.write_bytes(moved.read_bytes()[:-1] + b"\x01")
    assert find_checkpoint(moved).sha256 != digest


@pytest.mark.parametrize("blocks", [True, False], ids=["blocks", "plain"])
def test_its_size_is_known_before_it_is_converted(
    write: Write, tmp_path: Path, blocks: bool
) -> None:
    from posttrain.backends.gguf_convert import convert
    from posttrain.estimate.shapes import model_of_directory, model_of_gguf

    path = write(blocks=blocks, tied=False)
    convert(path, tmp_path / "out")
    before, after = model_of_gguf(path), model_of_directory(tmp_path / "out")
    assert before is not None and after is not None
    assert before == after
    path.write_bytes(b"GGUF")
    assert model_of_gguf(path) is None


def test_a_plan_reads_what_it_asks_for(write: Write) -> None:
    source = find_checkpoint(write())
    assert source.gguf is not None and source.gguf.name == "tiny.gguf"
    assert source.config["model_type"] == "llama" and source.config["hidden_size"] == WIDTH
    assert source.config["tie_word_embeddings"] is True
    assert source.chat_template == ("tiny.gguf", TEMPLATE)
    assert source.added == {"<|im_start|>", "<|im_end|>"}
    assert source.tensors["blk.0.ffn_up.weight"].shape == (96, WIDTH)
    assert source.origin["license"] == "apache-2.0"
    end = ends_of(source)
    assert end is not None and end.ids == (len(tokens()) - 1,)
    assert token_conflict(source, source) is None


def rewritten(path: Path, change: Callable[[bytes], bytes]) -> Path:
    path.write_bytes(change(path.read_bytes()))
    return path


DAMAGED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut short": (lambda b: b[:-5000], "it was cut short; fetch the file again"),
    "cut in the head": (lambda b: b[:900], "its head cannot be read"),
    "empty": (lambda b: b"", "it has 0 bytes, fewer than a GGUF file begins with"),
    "something else": (lambda b: b"PK\x03\x04" + b[4:], "it is not a GGUF file (it begins with"),
    "old version": (lambda b: b[:4] + struct.pack("<I", 1) + b[8:], "GGUF version 1; "),
    "unknown family": (
        lambda b: b.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0xlama"),
        "general.architecture is 'xlama', which the installed transformers does not read",
    ),
    "pointer": (lambda b: b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_told_in_one_sentence(write: Write, case: str) -> None:
    change, said = DAMAGED[case]
    path = rewritten(write(), change)
    with pytest.raises(ConfigError) as caught:
        find_checkpoint(path)
    assert said in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_transformers_cannot_read_ends_the_stage_in_words(
    write: Write, tmp_path: Path
) -> None:
    from posttrain.backends.gguf_convert import convert

    path = rewritten(write(), lambda b: b.replace(b"blk.1.ffn_up", b"blk.7.ffn_up"))
    with pytest.raises(ConfigError, match=r"tensors of the model are not in it, .*layers\.1\.mlp"):
        convert(path, tmp_path / "out")
    path = rewritten(write(), lambda b: b.replace(b"tokenizer.ggml.model", b"tokenizer.ggml.modem"))
    with pytest.raises(ConfigError, match="transformers makes no model of it"):
        convert(path, tmp_path / "out")


def test_of_several_files_one_has_to_be_named(write: Write, tmp_path: Path) -> None:
    write(name="a-Q4.gguf")
    write(name="a-Q8.gguf")
    with pytest.raises(ConfigError, match=r"2 GGUF files \(a-Q4\.gguf, a-Q8\.gguf\); name one"):
        find_checkpoint(tmp_path)
    assert gguf_of(tmp_path / "a-Q8.gguf") == tmp_path / "a-Q8.gguf"


def test_beside_safetensors_they_are_no_part(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "model.gguf").touch()
    assert gguf_of(tmp_path) is None


def test_missing_packages_name_the_extra(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write()
    monkeypatch.setattr(outside.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs gguf and accelerate: pip install 'posttrain\[gg"):
        outside.check_packages(path)
    # The sizes of blocks are the package's; the head can be read without it.
    assert read_head(path).tensors["output_norm.weight"].shape == (WIDTH,)


def test_the_families_are_those_of_transformers() -> None:
    assert {"llama", "qwen2", "qwen3", "gpt2"} <= known_families()
    assert "tokenizer" not in known_families()


def test_adopt_and_chat_say_what_to_do_instead(write: Write, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from posttrain.cli import app
    from posttrain.commands.chat import find_model

    path = write()
    with pytest.raises(ConfigError, match="converted by a run that starts from it"):
        find_model(tmp_path / "store", str(path))
    found = CliRunner().invoke(
        app, ["adopt", str(path), "--name", "mine", "--store", str(tmp_path / "store")]
    )
    assert isinstance(found.exception, ConfigError)
    assert "need not be adopted" in str(found.exception)
