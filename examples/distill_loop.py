"""On-policy distillation from two teachers as one plain loop. No framework.

    python examples/distill_loop.py                 ten seconds on a CPU

Two specialists, one for sums and one for differences, teach one student: the student answers, the
teacher of each problem reads the answer, and the student descends the KL divergence from itself to
that teacher at every token that it wrote (MOPD, arXiv 2606.30406). It is what the stage `distill`
does, without recipes, stages, settings or the store.

Shape suffixes: B rows (responses), N sampled tokens of all rows, one after another, D hidden size,
V vocabulary.
"""

import argparse
import copy
import random

from posttrain.backends.base import HeadLoss, LearnerSettings, TokenLoss
from posttrain.backends.local import LocalLearner, LocalSampler, LocalScorer
from posttrain.backends.tiny import character_tokenizer, new_model
from posttrain.rewards.verifiers import ExactVerifier
from posttrain.rl.batch import Batch, concatenate
from posttrain.rl.seeds import step_seed

DIGITS = range(10)
DOMAINS = {
    "sum": [{"prompt": f"{a}+{b}", "answer": str(a + b)} for a in DIGITS for b in DIGITS],
    "difference": [{"prompt": f"{a}-{b}", "answer": str(a - b)} for a in DIGITS for b in DIGITS],
}
SETTINGS = LearnerSettings(betas=(0.9, 0.98), weight_decay=0.0, max_grad_norm=1.0)


def sft_loss(_, logp_N, entropy_N, batch):
    """Cross-entropy of the tokens of a demonstration, summed. A `TokenLoss`."""
    return -logp_N.sum(), {"loss": -logp_N.detach().sum()}


def reverse_kl(_, hidden_ND, head, batch):
    """KL(student || teacher) over the whole vocabulary, summed over tokens. A `HeadLoss`.

    Written out for a vocabulary of 100. With one of 100,000 no [N, V] matrix should ever be whole:
    `posttrain.losses.distill.full_vocabulary` computes the same in chunks, from the
    teachers' hidden states.
    """
    logp_NV = (hidden_ND @ head.weight_VD.T).log_softmax(-1)  # the student, with a gradient
    kl_N = (logp_NV.exp() * (logp_NV - batch["teacher_logp_NV"])).sum(-1)
    return kl_N.sum(), {"kl": kl_N.detach().sum()}


def imitate(learner, problems, *, steps, seed, lr=3e-3):
    """Supervised fine-tuning on the right answers."""
    chat = learner.chat
    for step in range(steps):
        drawn = random.Random(step_seed(seed, step)).sample(problems, 32)
        batch = Batch.from_tokens(
            [chat.prompt(problem["prompt"]) for problem in drawn],
            [chat.response(problem["prompt"], problem["answer"]) for problem in drawn],
            pad_id=chat.pad_id,
        )
        learner.update(batch, TokenLoss(sft_loss), count=batch.num_tokens, lr=lr)


def sample(learner, problems, *, seed, temperature=1.0):
    """One response to each problem, with the learner's present weights."""
    return LocalSampler(learner).sample(
        [learner.chat.prompt(problem["prompt"]) for problem in problems],
        group_size=1,
        max_new_tokens=4,
        temperature=temperature,
        seed=seed,
    )


def accuracy(learner, problems):
    """Share of the problems that greedy decoding solves."""
    verifier = ExactVerifier()
    texts = map(learner.chat.decode, sample(learner, problems, seed=0, temperature=0).responses())
    return sum(map(verifier.score, texts, problems)) / len(problems)


def main(*, steps=150, warmup=200, specialise=300, lr=2e-3, seed=0):
    """Trains, and returns the accuracy of init, teachers and student in each domain."""
    base = new_model(
        character_tokenizer([]),
        hidden_size=64,
        num_layers=2,
        num_heads=2,
        head_dim=32,
        intermediate_size=128,
        max_positions=32,
        seed=seed,
    )
    # The init solves some problems of both domains. Teachers and student start from its weights.
    student = LocalLearner(base, SETTINGS)
    imitate(student, DOMAINS["sum"] + DOMAINS["difference"], steps=warmup, seed=seed)
    scores = {"init": {name: accuracy(student, rows) for name, rows in DOMAINS.items()}}

    # One specialist per domain. It forgets the other one.
    teachers, scores["teacher"] = {}, {}
    for name, rows in DOMAINS.items():
        specialist = LocalLearner(copy.deepcopy(base), SETTINGS)
        imitate(specialist, rows, steps=specialise, seed=seed + 1)
        teachers[name] = LocalScorer(specialist)  # read only, from here on
        scores["teacher"][name] = accuracy(specialist, rows)

    for step in range(steps):
        batches = []
        for number, (name, rows) in enumerate(DOMAINS.items()):
            # 1. The student answers problems of the domain: B rows.
            drawn = random.Random(step_seed(seed, step)).sample(rows, 32)
            batch = sample(student, drawn, seed=step_seed(seed + number, step))
            # 2. The teacher of that domain, and no other, reads them: hidden states [N, E] that
            #    predict the N sampled tokens, and from these a distribution over the vocabulary.
            teacher = teachers[name]
            logits_NV = teacher.hidden(batch) @ teacher.head.weight_VD.T
            batch["teacher_logp_NV"] = logits_NV.log_softmax(-1)
            batches.append(batch)
        # 3. One optimiser step on both domains. Columns go along with their rows into the forward
        #    passes, so the loss finds the teacher's numbers beside the student's.
        both = concatenate(batches)
        sums = student.update(both, HeadLoss(reverse_kl), count=both.num_tokens, lr=lr)
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:3d}  KL {sums['kl'] / both.num_tokens:.3f} nats per token")

    scores["student"] = {name: accuracy(student, rows) for name, rows in DOMAINS.items()}
    for who, of in scores.items():
        print(f"{who:8}", *(f"{name} {value:.2f}" for name, value in of.items()), sep="  ")
    return scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
