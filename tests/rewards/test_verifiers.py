"""Every verifier with right, wrong and edge answers, and what it says about broken ones."""

import json
from pathlib import Path

import pytest

from posttrain.engine.errors import ConfigError, StageError
from posttrain.rewards.formats import FORMATS, TextFormat
from posttrain.rewards.spec import parse_verifier, resolve_verifier
from posttrain.rewards.verifiers import MathVerifier, choice_letter, load_verifier, make_verifier


def problem(answer, **meta):
    return {
        "id": "p-1",
        "domain": "d",
        "prompt": "a question",
        "answer": answer,
        "demo": None,
        "meta": meta,
    }


def verifier(name, **options):
    return make_verifier({"name": name, "options": options})


@pytest.fixture(scope="module")
def math():
    return MathVerifier()


@pytest.mark.parametrize(
    ("answer", "response", "score"),
    [
        ("42", "42", 1.0),
        ("42", "The answer is 42.", 1.0),
        ("42", "The answer is 43.", 0.0),
        ("42", "", 0.0),
        ("42", "I do not know", 0.0),
        ("0.5", r"so $\boxed{\frac{1}{2}}$", 1.0),
        (r"\frac{1}{2}", "0.5", 1.0),
        (r"$x^2 + 2x + 1$", r"$(x+1)^2$", 1.0),
        (r"$x^2 + 2x + 1$", r"$(x+2)^2$", 0.0),
        ("1,000", "1000", 1.0),
        ("-3", "3", 0.0),
        ("7", "first 3, then 4, so $7$", 1.0),
    ],
)
def test_math(math, answer, response, score):
    assert math.score(response, problem(answer)) == score


@pytest.mark.parametrize(
    ("answer", "response", "score"),
    [
        ("Yes", "$sYe$", 0.0),
        ("Yes", "The answer is Yes.", 1.0),
        ("Yes", "not Yes", 0.0),
        ("Monday", "**Monday**", 1.0),
        ("No solution", r"so $\boxed{\text{no solution}}$", 1.0),
        (r"\text{even}", r"\boxed{\text{odd}}, not even", 0.0),
        ("See figure", "figure See", 0.0),
        ("xyz", "$zyx$", 1.0),
    ],
)
def test_math_compares_answers_that_are_words_as_text(math, answer, response, score):
    math.check(problem(answer))
    assert math.score(response, problem(answer)) == score


def test_math_names_the_problem_whose_answer_is_not_mathematics(math):
    with pytest.raises(StageError, match=r"p-1.*cannot read the reference answer '\?\?'"):
        math.check(problem("??"))


@pytest.mark.parametrize(
    ("options", "answer", "response", "score"),
    [
        ({}, "cat", " cat\n", 1.0),
        ({}, "cat", "Cat", 0.0),
        ({}, "cat", "a cat", 0.0),
        ({"case_sensitive": False}, "cat", "CAT", 1.0),
        ({"extract": r"<a>(.*?)</a>"}, "7", "<a>6</a> no, <a> 7 </a>", 1.0),
        ({"extract": r"<a>(.*?)</a>"}, "7", "7", 0.0),
        ({"extract": r"\d+"}, "12", "from 3 to 12 it is", 1.0),
        ({"extract": r"\d+"}, "3", "from 3 to 12 it is", 0.0),
        ({"extract": r"x(y)?"}, "y", "x", 0.0),
    ],
)
def test_exact(options, answer, response, score):
    assert verifier("exact", **options).score(response, problem(answer)) == score


def test_exact_refuses_an_empty_answer():
    with pytest.raises(StageError, match="p-1"):
        verifier("exact").check(problem("  "))


@pytest.mark.parametrize(
    ("options", "answer", "response", "score"),
    [
        ({"pattern": r"^= {answer}$"}, "1.5", "= 1.5", 1.0),
        ({"pattern": r"^= {answer}$"}, "1.5", "= 1x5", 0.0),
        ({"pattern": r"\d{2}{answer}"}, "a", "12a", 1.0),
        ({"pattern": "{answer}", "case_sensitive": False}, "Yes", "YES!", 1.0),
        ({"from_answer": True}, r"colou?r", "the color", 1.0),
        ({"from_answer": True}, r"colou?r", "the culler", 0.0),
    ],
)
def test_regex(options, answer, response, score):
    assert verifier("regex", **options).score(response, problem(answer)) == score


@pytest.mark.parametrize("answer", ["(", ".*"])
def test_regex_refuses_an_answer_that_is_no_pattern_or_accepts_everything(answer):
    with pytest.raises(StageError, match="p-1"):
        verifier("regex", from_answer=True).check(problem(answer))


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        (" (c). ", "C"),
        ("The answer is (D).", "D"),
        ("the answer is b", "B"),
        ("Answer: **C**", "C"),
        ("A is wrong and B is wrong, so the answer is A because it fits", "A"),
        ("Not (A), but (C)", "C"),
        (r"hence \boxed{E}", "E"),
        ("A cat has four legs, so D", "D"),
        ("I think it is a good one", None),
        ("The answer is a good one", None),
        ("It is BAD", None),
        ("answer is A. No, the answer is B.", "B"),
        ("K", None),
        ("", None),
    ],
)
def test_choice_letter(response, letter):
    assert choice_letter(response) == letter


def test_choice_compares_letters_only():
    choice = verifier("choice")
    assert choice.score("the answer is (b)", problem("B")) == 1.0
    assert choice.score("the answer is (b)", problem("(B)")) == 1.0
    assert choice.score("the answer is (b)", problem("A")) == 0.0
    assert choice.score("no letter", problem("A")) == 0.0
    with pytest.raises(StageError, match=r"p-1.*one letter from A to J.*'seven'"):
        choice.check(problem("seven"))


ENTRY = {"question": "1 + 2 =", "answer": "3", "metadata": {}}


def test_reasoning_gym_scores_all_or_nothing_unless_partial():
    strict = verifier("reasoning_gym:chain_sum")
    partial = verifier("reasoning_gym:chain_sum", partial=True)
    sums = problem("3", entry=ENTRY)
    assert strict.score("3", sums) == 1.0
    assert strict.score("3.0", sums) == 1.0
    assert strict.score("4", sums) == 0.0
    assert strict.score("", sums) == 0.0
    letters = problem("abc", entry={"question": "", "answer": "abc", "metadata": {}})
    word = "reasoning_gym:letter_jumble"
    assert verifier(word).score("abc", letters) == 1.0
    near = verifier(word, partial=True).score("abd", letters)
    assert verifier(word).score("abd", letters) == 0.0
    assert 0.0 <= near < 1.0
    assert partial.score("3", sums) == 1.0


def test_reasoning_gym_passes_partial_marks_on():
    marks = verifier("reasoning_gym:word_sorting", partial=True)
    words = problem("a, b", entry={"question": "", "answer": "a, b", "metadata": {}})
    words["meta"]["entry"]["metadata"] = {"sorted_words": ["a", "b"]}
    assert marks.score("a, b", words) == 1.0
    assert verifier("reasoning_gym:word_sorting").score("b, a", words) == 0.0
    assert 0.0 < marks.score("b, a", words) < 1.0


def test_reasoning_gym_does_not_run_code_from_a_response(tmp_path):
    """`score_answer` of string_insertion calls eval() on the response."""
    target = tmp_path / "written"
    insertion = verifier("reasoning_gym:string_insertion")
    task = problem("ABCD", entry={"question": "", "answer": "ABCD", "metadata": {}})
    assert insertion.score("ABCD", task) == 1.0
    assert insertion.score(f"[open({str(target)!r}, 'w').name]", task) == 0.0
    assert insertion.score("().__class__", task) == 0.0
    assert not target.exists()


def test_reasoning_gym_tells_a_broken_problem_from_a_broken_response():
    needs_metadata = verifier("reasoning_gym:countdown")
    with pytest.raises(StageError, match=r"p-1.*countdown"):
        needs_metadata.check(problem("1 + 2"))


def test_reasoning_gym_reads_a_table_row():
    assert verifier("reasoning_gym:chain_sum").score("3", problem("3", metadata={})) == 1.0


def test_reasoning_gym_uses_the_format(monkeypatch):
    class Spelled(TextFormat):
        def answer(self, response):
            return str(["zero", "one", "two", "three"].index(response))

    monkeypatch.setitem(FORMATS, "spelled", Spelled())
    spelled = verifier("reasoning_gym:chain_sum", format="spelled")
    assert spelled.score("three", problem("3", entry=ENTRY)) == 1.0
    assert spelled.score("two", problem("3", entry=ENTRY)) == 0.0
    assert spelled.score("a word it does not know", problem("3", entry=ENTRY)) == 0.0


def python_verifier(tmp_path, source, function="score"):
    file = tmp_path / "grade.py"
    file.write_text(source)
    resolved = resolve_verifier(parse_verifier(f"python:grade.py:{function}"), tmp_path)
    return make_verifier(resolved.config, resolved.runtime)


def test_python_function_gets_response_and_problem(tmp_path):
    source = "def score(response, problem):\n    return len(response) / problem['meta']['length']\n"
    grade = python_verifier(tmp_path, source)
    assert grade.score("ab", problem("", length=4)) == 0.5


@pytest.mark.parametrize("value", ["True", "1", "1.0", "__import__('numpy').float32(1)"])
def test_python_function_may_return_a_bool_or_a_number(tmp_path, value):
    grade = python_verifier(tmp_path, f"def score(response, problem):\n    return {value}\n")
    assert grade.score("", problem("")) == 1.0


@pytest.mark.parametrize("value", ["'1'", "None", "2", "-0.1", "float('nan')", "[1]"])
def test_python_function_with_a_wrong_value_is_an_error(tmp_path, value):
    grade = python_verifier(tmp_path, f"def score(response, problem):\n    return {value}\n")
    with pytest.raises(StageError, match=r"grade\.py: score\(\) on problem p-1 returned"):
        grade.score("", problem(""))


def test_python_function_that_raises_is_an_error_and_not_a_zero(tmp_path):
    source = "def score(response, problem):\n    n = int(response)\n    return n\n"
    grade = python_verifier(tmp_path, source)
    pattern = r"grade\.py: score\(\) on problem p-1 raised ValueError.*line 2.*'four'"
    with pytest.raises(StageError, match=pattern):
        grade.score("four", problem(""))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def scores(r, p):\n    return 1\n", "did you mean 'scores'"),
        ("def score(r, p)\n    return 1\n", "line 1"),
        ("import neighbour\ndef score(r, p):\n    return 1\n", "'neighbour' from beside it"),
        ("from . import x\ndef score(r, p):\n    return 1\n", "stand alone"),
        ("raise RuntimeError('no')\ndef score(r, p):\n    return 1\n", "RuntimeError: no"),
    ],
)
def test_python_file_is_checked_before_it_runs(tmp_path, source, message):
    (tmp_path / "neighbour.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match=message):
        python_verifier(tmp_path, source)


def test_python_file_that_is_missing(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.py does not exist"):
        resolve_verifier(parse_verifier("python:nowhere.py:score"), tmp_path)


def test_python_identity_is_bytes_and_not_place(tmp_path):
    places = []
    for folder, source in (("a", "return 1"), ("b", "return 1"), ("c", "return 0")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "grade.py").write_text(f"def score(r, p):\n    {source}\n")
        spec = parse_verifier("python:grade.py:score")
        places.append(resolve_verifier(spec, tmp_path / folder))
    same, moved, edited = places
    assert (same.config, same.data) == (moved.config, moved.data)
    assert same.runtime != moved.runtime
    assert same.data != edited.data
    assert str(tmp_path) not in json.dumps([same.config, same.data])


def test_load_verifier_reads_a_domain_directory(tmp_path):
    config = {"name": "python:score", "options": {}}
    (tmp_path / "domain.json").write_text(json.dumps({"config": {"verifier": config}}))
    (tmp_path / "verifier.py").write_text("def score(r, p):\n    return r == p['answer']\n")
    loaded = load_verifier(Path(tmp_path))
    assert loaded.score("x", problem("x")) == 1.0
    assert loaded.score("y", problem("x")) == 0.0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("maths", {}, "unknown verifier 'maths'; did you mean 'math'?.*choices: math, exact"),
        ("", {}, "unknown verifier ''"),
        ("math:x", {}, "has to be written 'math'"),
        ("reasoning_gym", {}, "has to be written 'reasoning_gym:<name>'"),
        ("reasoning_gym:chain_sums", {}, "no dataset 'chain_sums'; did you mean 'chain_sum'"),
        ("reasoning_gym:chain_sum", {"params": {"max_term": 3}}, "did you mean 'max_terms'"),
        ("reasoning_gym:chain_sum", {"params": {"seed": 3}}, "seed is set by the domain"),
        ("python:grade:score", {}, r"has to be written 'python:<file\.py>:<function>'"),
        ("math", {"pattern": "x"}, "no option 'pattern'"),
        ("exact", {"case_sensitiv": False}, "did you mean 'case_sensitive'"),
        ("exact", {"case_sensitive": "no"}, "option case_sensitive .* has to be a bool"),
        ("exact", {"extract": "("}, "option extract: '\\(' is not a regular expression"),
        ("exact", {"extract": "(a)(b)"}, "has 2 groups"),
        ("regex", {}, "needs one of pattern"),
        ("regex", {"pattern": "a", "from_answer": True}, "needs one of pattern"),
        ("regex", {"pattern": "[{answer}"}, "not a regular expression"),
    ],
)
def test_bad_verifiers_are_refused_at_plan_time(name, options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_verifier(name, options, where="mine.toml: domains.a.verifier")
    assert str(caught.value).startswith("mine.toml: domains.a.verifier: ")
