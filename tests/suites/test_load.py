"""Finding a suite: shipped names, TOML files, Python files, and the message for each mistake."""

import json

import pytest

from posttrain.engine.errors import ConfigError
from posttrain.suites.domain import Domain, Procedural, Table, VerifierSpec, domain_node
from posttrain.suites.load import load_suite

TABLE = """
name = "mine"
[domains.algebra]
train = "algebra.jsonl"
prompt = "question"
verifier = "exact"
case_sensitive = false
[domains.sums]
dataset = "chain_sum"
params = { max_terms = 3 }
num_train = 20
num_validation = 2
num_heldout = 3
"""


def toml(tmp_path, text):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    return str(file)


def test_toml_file(tmp_path):
    rows = [{"question": f"q {n}", "answer": str(n)} for n in range(100)]
    (tmp_path / "algebra.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite, base = load_suite(toml(tmp_path, TABLE))
    assert base == tmp_path
    assert suite.name == "mine"
    assert suite.domains["algebra"] == Domain(
        name="algebra",
        source=Table(train="algebra.jsonl", prompt="question"),
        verifier=VerifierSpec(name="exact", options={"case_sensitive": False}),
    )
    assert suite.domains["sums"] == Domain(
        name="sums",
        source=Procedural(
            dataset="chain_sum",
            params={"max_terms": 3},
            num_train=20,
            num_validation=2,
            num_heldout=3,
        ),
        verifier=VerifierSpec(name="reasoning_gym:chain_sum"),
    )
    assert set(domain_node(suite.domains["algebra"], base).data) == {"train"}


def test_a_relative_name_starts_from_base(tmp_path):
    toml(tmp_path, TABLE)
    suite, base = load_suite("mine.toml", tmp_path)
    assert (suite.name, base) == ("mine", tmp_path)


def test_the_same_domain_has_one_identity_from_toml_and_python(tmp_path):
    (tmp_path / "suite.py").write_text(
        "from posttrain.suites.domain import Domain, Procedural, Suite, VerifierSpec\n"
        "def suite():\n"
        "    source = Procedural(dataset='chain_sum', params={'max_terms': 3}, num_train=20,\n"
        "                        num_validation=2, num_heldout=3)\n"
        "    spec = VerifierSpec(name='reasoning_gym:chain_sum')\n"
        "    domain = Domain(name='sums', source=source, verifier=spec)\n"
        "    return Suite(name='other', domains={'sums': domain})\n"
    )
    from_python, base = load_suite("suite.py", tmp_path)
    from_toml, _ = load_suite(toml(tmp_path, TABLE))
    nodes = [domain_node(suite.domains["sums"], base) for suite in (from_python, from_toml)]
    assert nodes[0] == nodes[1]


def test_shipped_name():
    suite, directory = load_suite("core")
    assert (suite.name, list(suite.domains)) == ("core", ["add", "reverse", "sort", "palindrome"])
    assert directory.joinpath("core.toml").is_file()


def replaced(old, new):
    assert old in TABLE
    return TABLE.replace(old, new)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", r"mine\.toml: not a TOML file"),
        ("", r"mine\.toml: it has no \[domains\.<name>\] table"),
        ("domains = 3", r"domains has to hold tables"),
        ("nam = 'x'\n" + TABLE, r"unknown key 'nam'; did you mean 'name'"),
        (replaced('name = "mine"', 'name = "My suite"'), r"name: the name 'My suite'"),
        (replaced("domains.sums", "domains.Sums"), r"domains\.Sums: the name 'Sums'"),
        (replaced('"exact"', '"exakt"'), r"algebra\.verifier: unknown .* did you mean 'exact'"),
        (replaced('verifier = "exact"', ""), r"domains\.algebra: verifier is missing"),
        (
            replaced("case_sensitive", "case_sensetive"),
            r"domains\.algebra: unknown key 'case_sensetive'; did you mean 'case_sensitive'",
        ),
        (replaced("prompt =", "promt ="), r"unknown key 'promt'; did you mean 'prompt'"),
        (replaced("num_train", "num_trains"), r"unknown key 'num_trains'; did you mean"),
        (replaced("num_train = 20", ""), r"domains\.sums: num_train is missing"),
        (
            replaced("num_train = 20", 'num_train = "20"'),
            r"num_train is '20'; .* whole number",
        ),
        (replaced("num_train = 20", "num_train = true"), r"sums\.num_train is True"),
        (replaced('"question"', "3"), r"algebra\.prompt is 3; it has to be a text"),
        (
            replaced('"question"', '"question"\nheldout = 0.1'),
            r"heldout is 0.1; it is where",
        ),
        (replaced('"question"', '"question"\nvalidation = false'), r"validation is False; it is"),
        (replaced("train = ", "trian = "), r"domains\.algebra: give either train .* 'trian' did"),
        (replaced("dataset =", "train = 'x'\ndataset ="), r"domains\.sums: give either train"),
        (
            replaced('"exact"', '"reasoning_gym:chain_sumz"').replace("case_sensitive = false", ""),
            r"algebra\.verifier: reasoning-gym has no dataset 'chain_sumz'; did you mean",
        ),
    ],
)
def test_every_mistake_in_a_toml_file_names_file_and_field(text, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as caught:
        load_suite(toml(tmp_path, text))
    assert str(tmp_path / "mine.toml") in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cor", r"unknown suite 'cor'; did you mean 'core'\? choices: core, words, or a path"),
        ("mien.toml", r"mien\.toml does not exist; did you mean 'mine\.toml'"),
        ("none.py", r"none\.py does not exist"),
        ("broken.py", r"broken\.py: loading the suite failed: ZeroDivisionError"),
        ("empty.py", r"empty\.py: it defines no function suite\(\)"),
        ("wrong.py", r"wrong\.py: suite\(\) returned a dict"),
    ],
)
def test_a_suite_that_cannot_be_found_or_read(spec, message, tmp_path):
    toml(tmp_path, TABLE)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "wrong.py").write_text("def suite():\n    return {}\n")
    with pytest.raises(ConfigError, match=message):
        load_suite(spec, tmp_path)
