"""A model as lm-eval asks it: its questions to our sampler, its continuations to our scorer.

Legend: N tokens of the continuations, row after row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from posttrain.backends.base import Sampler, Scorer
from posttrain.engine.errors import StageError
from posttrain.rl.batch import Batch
from posttrain.rl.seeds import step_seed
from posttrain.stages.context import Context
from posttrain.stages.settings.models import Harness

NEW_TOKENS = 256
"""Longest response where neither the stage nor the task says."""
AT_ONCE = 64
"""Requests that are answered together and then kept."""


class Answers:
    """What was answered so far, by request, in a file: a line for each as it comes."""

    def __init__(self, path: Path) -> None:
        """Reads what an attempt that was stopped has left."""
        self.path = path
        self.known: dict[str, Any] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                key, answer = json.loads(line)
            except ValueError:
                # The last line of an attempt that was killed while it wrote.
                continue
            self.known[key] = answer

    def add(self, key: str, answer: Any) -> None:
        """Keep one answer."""
        self.known[key] = answer
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([key, answer]) + "\n")


class HarnessModel(LM):
    """What lm-eval calls a model."""

    def __init__(
        self,
        make_sampler: Callable[[], Sampler],
        scorer: Scorer,
        settings: Harness,
        *,
        answers: Answers,
        ctx: Context,
    ) -> None:
        """The sampler is made when a task wants responses, and the scorer rests meanwhile: most
        tasks need one of them, and so one model in memory."""
        super().__init__()
        self._make_sampler, self.scorer, self.settings = make_sampler, scorer, settings
        self.answers, self.ctx = answers, ctx
        self.chat = scorer.chat

    @cached_property
    def sampler(self) -> Sampler:
        """Of the same model as the scorer."""
        return self._make_sampler()

    # -- text ------------------------------------------------------------------------------------

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval keeps its caches of requests by; none are kept."""
        return "posttrain"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Which template is in use, for lm-eval's own log."""
        return str(self.chat.tokenizer.chat_template or "")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation up to where the assistant speaks; the last message is begun
        for it where it is the assistant's."""
        if add_generation_prompt or chat_history[-1]["role"] != "assistant":
            return self.chat.laid_out(chat_history)
        return self.chat.laid_out(chat_history[:-1]) + chat_history[-1]["content"]

    # -- what lm-eval asks -----------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The response to each request, cut before the first of its stop texts."""
        return self._answered("generate_until", requests, self._generate)

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding would give it."""
        found = self._answered("loglikelihood", requests, self._score)
        return [(float(logp), bool(greedy)) for logp, greedy in found]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each text as a whole, every token with as much before it as the model
        has positions for."""
        return [
            float(v) for v in self._answered("loglikelihood_rolling", requests, self._score_whole)
        ]

    def _answered(
        self, what: str, requests: Sequence[Any], answer: Callable[[Sequence[Any]], Sequence[Any]]
    ) -> list[Any]:
        """Answers in the order of the requests; those that are known are not asked again."""
        keys = [_key(what, number, request) for number, request in enumerate(requests)]
        left = [place for place, key in enumerate(keys) if key not in self.answers.known]
        # The longest first: what does not fit shows at once, and rows of like length go together.
        left.sort(key=lambda place: -len(str(requests[place].args[0])))
        for start in range(0, len(left), AT_ONCE):
            places = left[start : start + AT_ONCE]
            for place, found in zip(places, answer([requests[p] for p in places]), strict=True):
                self.answers.add(keys[place], found)
            done = len(requests) - len(left) + start + len(places)
            self.ctx.log(done, len(requests), tokens=0)
        return [self.answers.known[key] for key in keys]

    # -- sampling --------------------------------------------------------------------------------

    def _generate(self, requests: Sequence[Any]) -> list[str]:
        self.scorer.rest()
        found: dict[int, str] = {}
        for how, places in _alike(requests).items():
            temperature, top_p, asked = how
            longest = self.settings.max_new_tokens or asked or NEW_TOKENS
            prompts = [self._prompt(str(requests[place].args[0]), room=longest) for place in places]
            batch = self.sampler.sample(
                prompts,
                group_size=1,
                max_new_tokens=longest,
                temperature=temperature,
                top_p=top_p,
                seed=step_seed(self.settings.seed, len(self.answers.known)),
            )
            for place, ids in zip(places, batch.responses(), strict=True):
                until = requests[place].args[1].get("until") or ()
                found[place] = cut(self.chat.decode(ids), until)
        return [found[place] for place in range(len(requests))]

    def _prompt(self, text: str, *, room: int) -> list[int]:
        """Token ids of a context, without its beginning where it would leave no room."""
        ids = self._ids(text)
        limit = self.chat.max_positions
        if limit is None or len(ids) + room <= limit:
            return ids
        if room >= limit:
            raise StageError(
                f"responses of {room} tokens do not fit the {limit} positions of the model; give "
                "--max-new-tokens below that"
            )
        self.ctx.warn(
            f"some questions are longer than the {limit} positions of the model leave room for; "
            "they were cut at their beginning (fewer examples: --fewshot)",
            about="long questions",
        )
        return ids[-(limit - room) :]

    # -- scoring ---------------------------------------------------------------------------------

    def _score(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        return self._logprobs([self._pair(*request.args) for request in requests])

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of context and continuation as they are when they stand together; spaces at the
        end of the context belong to the continuation."""
        stripped = context.rstrip(" ")
        continuation = context[len(stripped) :] + continuation
        if not stripped:
            return self._before(), self._ids(continuation, first=False)
        before = self._ids(stripped)
        whole = self._ids(stripped + continuation)
        after = whole[len(before) :]
        return before, after or whole[-1:]

    def _score_whole(self, requests: Sequence[Any]) -> list[float]:
        totals = []
        for request in requests:
            ids = self._ids(str(request.args[0]), first=False)
            windows = get_rolling_token_windows(
                token_list=ids,
                prefix_token=self._before()[0],
                max_seq_len=self._positions() - 1,
                context_len=1,
            )
            found = self._logprobs([make_disjoint_window(window) for window in windows])
            totals.append(sum(logp for logp, _ in found))
        return totals

    def _logprobs(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """For each context and continuation the log-probability, and whether each token is the
        likeliest."""
        limit = self._positions()
        longest = max(len(after) for _, after in pairs)
        if longest >= limit:
            raise StageError(
                f"a continuation of {longest} tokens is longer than the {limit} positions of the "
                "model leave room for; leave its task out"
            )
        kept = [(before[-max(1, limit - len(after)) :], after) for before, after in pairs]
        rows = Batch.from_tokens(
            [before for before, _ in kept], [after for _, after in kept], pad_id=self.chat.pad_id
        )
        logp_N = self.scorer.logprobs(rows)
        likeliest_N1, _ = self.scorer.top_k(rows, 1)
        same_N = likeliest_N1[:, 0].cpu() == rows.targets_N
        lengths = rows.sampled_len_B.tolist()
        return [
            (float(logp.double().sum()), bool(same.all()))
            for logp, same in zip(logp_N.split(lengths), same_N.split(lengths), strict=True)
        ]

    def _positions(self) -> int:
        return self.chat.max_positions or 4096

    def _ids(self, text: str, *, first: bool = True) -> list[int]:
        """Token ids of a text; where it is the `first` of its row, behind the BOS token if the
        tokenizer begins every text with it and no template has."""
        ids = self.chat.encoded(text)
        opening = list(self.chat.tokenizer("")["input_ids"])[:1]
        begins = bool(opening) and opening == [self.chat.tokenizer.bos_token_id]
        ids = ids[1:] if begins and ids[:1] == opening else ids
        return [*opening, *ids] if begins and first else ids

    def _before(self) -> list[int]:
        """What stands before a text that begins with nothing."""
        bos = self.chat.tokenizer.bos_token_id
        return [self.chat.stop_ids[0] if bos is None else bos]


def cut(text: str, until: Sequence[str] | str) -> str:
    """A response up to the first of the texts that end it."""
    ends = [until] if isinstance(until, str) else list(until)
    places = [text.find(end) for end in ends if end and end in text]
    return text[: min(places)] if places else text


def _alike(requests: Sequence[Any]) -> dict[tuple[float, float, int | None], list[int]]:
    """Places of requests that are to be sampled in the same way: temperature, top_p and longest
    response. Without `do_sample` or with a temperature of 0 it is greedy."""
    found: dict[tuple[float, float, int | None], list[int]] = {}
    for place, request in enumerate(requests):
        how: Mapping[str, Any] = request.args[1]
        temperature = float(how.get("temperature") or 0.0) if how.get("do_sample") else 0.0
        if how.get("do_sample") and "temperature" not in how:
            temperature = 1.0
        top_p = float(how.get("top_p") or 1.0) if temperature else 1.0
        asked = how.get("max_gen_toks") or how.get("max_new_tokens") or how.get("max_tokens")
        found.setdefault((temperature, top_p, asked), []).append(place)
    return found


def _key(what: str, number: int, request: Any) -> str:
    """What tells a request from every other one: repeats of a sampled question are two."""
    text = json.dumps([what, number, request.args], default=str)
    return hashlib.sha256(text.encode()).hexdigest()
