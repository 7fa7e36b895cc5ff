"""merge: the arithmetic reaches the checkpoint, every setting counts, unlike models are refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from posttrain.backends.checkpoint import LanguageModel, load
from posttrain.backends.saved_types import recast
from posttrain.engine.errors import ConfigError
from posttrain.engine.work import read_warnings
from posttrain.stages.config import build_config

RunStage = Callable[..., Any]
MakeModel = Callable[..., LanguageModel]
SaveModel = Callable[[LanguageModel], str]


@pytest.fixture
def merge(run_stage: RunStage, models: Mapping[str, str]) -> Callable[..., Any]:
    """Merge the models one and two, with `start` as base where there is one."""

    def run(one: str = models["one"], two: str = models["two"], **settings: Any) -> Any:
        inputs = {"models.two": two, "models.one": one}
        if settings.get("how", "average") != "average":
            inputs["base"] = models["start"]
        return run_stage("merge", settings, inputs)

    return run


def weights(path: str) -> dict[str, torch.Tensor]:
    return load_file(Path(path) / "model.safetensors")


def test_an_average_is_an_ordinary_checkpoint(
    merge: Callable[..., Any], models: Mapping[str, str]
) -> None:
    ran = merge(weights={"one": 3.0})
    one, two = weights(models["one"]), weights(models["two"])
    found = ran.weights()
    assert found.keys() == one.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, 0.75 * one[name] + 0.25 * two[name])
    language_model = load(ran.out)
    assert language_model.stop_ids == load(models["one"]).stop_ids
    assert language_model.tokenizer.chat_template == load(models["one"]).tokenizer.chat_template
    size = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(ran.out).parameters())
    assert ran.metrics == {"parameters": size, "models": 2}
    assert "merged from the weights of several models" in (ran.out / "README.md").read_text()
    assert sorted(path.name for path in ran.out.parent.iterdir()) == ["facts.json", "out"]


def test_differences_are_added_to_the_base(
    merge: Callable[..., Any], models: Mapping[str, str]
) -> None:
    one, two, start = (weights(models[name]) for name in ("one", "two", "start"))
    found = merge(how={"kind": "task_arithmetic", "scale": 0.1}, weights={"two": -0.5}).weights()
    for name, weight in found.items():
        change = (one[name] - start[name]) - 0.5 * (two[name] - start[name])
        torch.testing.assert_close(weight, start[name] + 0.1 * change)


SETTINGS: list[dict[str, Any]] = [
    {"how": "average"},
    {"how": "average", "weights": {"two": 0.25}},
    {"how": "task_arithmetic"},
    {"how": {"kind": "task_arithmetic", "scale": 0.5}},
    {"how": "ties"},
    {"how": {"kind": "ties", "density": 0.5}},
    {"how": {"kind": "ties", "scale": 0.5}},
    {"how": "ties", "weights": {"one": 0.5}},
    {"how": "dare_linear"},
    {"how": {"kind": "dare_linear", "density": 0.5}},
    {"how": "dare_linear", "seed": 1},
    {"how": "dare_ties"},
    {"how": "dare_ties", "seed": 1},
]


def test_every_setting_changes_the_result(merge: Callable[..., Any], same: Any) -> None:
    results = {str(changes): merge(**changes) for changes in SETTINGS}
    names = list(results)
    alike = [
        (one, other)
        for i, one in enumerate(names)
        for other in names[i + 1 :]
        if same(results[one], results[other])
    ]
    assert alike == []
    assert same(results[names[-1]], merge(**SETTINGS[-1])), "the same draws again"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "llama"}, r"of config.json is .* in 'two' and .* in 'one'"),
        ({"vocabulary": 120}, "vocab_size of config.json is 120 in 'two' and 100 in 'one'"),
    ],
)
def test_unlike_models_are_refused(
    merge: Callable[..., Any],
    make_model: MakeModel,
    save_model: SaveModel,
    change: dict[str, Any],
    message: str,
) -> None:
    one = save_model(make_model())
    with pytest.raises(ConfigError, match=rf"'two' and 'one' cannot be merged: .*{message}"):
        merge(one=one, two=save_model(make_model(**change)))


def test_other_tokens_and_other_tensors_are_refused(
    merge: Callable[..., Any], make_model: MakeModel, save_model: SaveModel
) -> None:
    one, two = save_model(make_model()), save_model(make_model(seed=1))
    tokenizer = Path(two, "tokenizer.json")
    text = tokenizer.read_text(encoding="utf-8")
    content = json.loads(text)
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    tokenizer.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"token 'a' has id \d+ in 'two'.*one tokenizer"):
        merge(one=one, two=two)
    tokenizer.write_text(text, encoding="utf-8")
    tensors = weights(two)
    del tensors["model.norm.weight"]
    save_file(tensors, Path(two) / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"tensor model\.norm\.weight is None in 'two' and"):
        merge(one=one, two=two)


def test_a_merge_ends_where_any_of_its_models_does_and_says_whose_template_it_has(
    merge: Callable[..., Any],
    make_model: MakeModel,
    save_model: SaveModel,
) -> None:
    one = save_model(make_model(stop=4))
    two = save_model(make_model(stop=[4, 9], seed=1, positions=32))
    Path(two, "chat_template.jinja").write_text("{{ messages[0]['content'] }}<|end|>")
    ran = merge(one=one, two=two)
    merged = load(ran.out)
    assert merged.stop_ids == (4, 9)
    assert merged.tokenizer.chat_template == load(one).tokenizer.chat_template
    assert merged.model.config.max_position_embeddings == 64
    warned = read_warnings(ran.out.parent)
    for what, text in zip(("chat template", "max_position_embeddings"), warned, strict=True):
        assert f"differ in their {what}; the merged model has that of 'one'" in text


def test_a_tied_head_that_one_checkpoint_holds_twice_is_no_difference(
    merge: Callable[..., Any], models: Mapping[str, str], save_model: SaveModel, same: Any
) -> None:
    """As the published Qwen3 checkpoints do."""
    two = save_model(load(models["two"]))
    tensors = weights(two)
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(tensors | head, Path(two) / "model.safetensors", metadata={"format": "pt"})
    assert same(merge(two=two), merge())


def test_settings_that_do_nothing_are_refused() -> None:
    for changes, message in [
        ({"how": {"kind": "average", "scale": 0.5}}, "'how.scale': unknown option"),
        ({"how": {"kind": "task_arithmetic", "density": 0.5}}, "'how.density': unknown option"),
        ({"how": "ties", "weights": {"a": -1.0}}, "a = -1.0 with how = ties; a negative weight"),
        ({"how": {"kind": "ties", "density": 0.0}}, "how.density"),
        ({"how": "slerp"}, "average.*task_arithmetic"),
    ]:
        with pytest.raises(ConfigError, match=message):
            build_config("merge", "mine", changes)


@pytest.mark.parametrize("how", ["average", "task_arithmetic", "ties", "dare_linear", "dare_ties"])
def test_a_head_that_the_config_only_claims_to_tie_is_merged(
    run_stage: RunStage, models: Mapping[str, str], save_model: SaveModel, how: str
) -> None:
    """The merge of a model with itself is that model, whatever its config says of its head."""
    apart = save_model(load(models["one"]))
    tensors = weights(apart)
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding + 0.5 * torch.roll(embedding, 1, 0)
    save_file(tensors, Path(apart) / "model.safetensors", metadata={"format": "pt"})
    inputs = {"models.one": apart, "models.two": apart}
    if how != "average":
        # The base ties its head: it has a copy of its embedding there. Halves add up to one.
        inputs["base"] = models["start"]
    dense = {"density": 1.0} if how not in ("average", "task_arithmetic") else {}
    settings = {"how": {"kind": how, **dense}, "weights": {"one": 0.5, "two": 0.5}}
    ran = run_stage("merge", settings, inputs)
    assert json.loads((ran.out / "config.json").read_text())["tie_word_embeddings"] is False
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        expected, found = (load(path).model(ids).logits for path in (apart, ran.out))
    assert (expected - found).abs().max() < 1e-4


def test_a_result_has_the_type_of_the_models_or_the_one_asked_for(
    merge: Callable[..., Any], models: Mapping[str, str], save_model: SaveModel, tmp_path: Path
) -> None:
    one, two = (save_model(load(models[name])) for name in ("one", "two"))
    recast(Path(one), "bfloat16")
    assert {t.dtype for t in merge(one=one, two=two).weights().values()} == {torch.float32}
    recast(Path(two), "bfloat16")
    halves = merge(one=one, two=two).weights()
    assert {tensor.dtype for tensor in halves.values()} == {torch.bfloat16}
    name = "model.norm.weight"
    mean = (weights(one)[name].float() + weights(two)[name].float()) / 2
    assert torch.equal(halves[name], mean.bfloat16()), "added up in float32, rounded at the end"
    whole = merge(one=one, two=two, save_dtype="float32").weights()
    assert torch.equal(whole[name], mean)
