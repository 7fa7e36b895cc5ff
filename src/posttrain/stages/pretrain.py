"""Pre-training from nothing: a tokenizer from the data, a tiny model, next-token prediction."""

from __future__ import annotations

from posttrain.backends.chat import Chat
from posttrain.backends.checkpoint import save
from posttrain.backends.tiny import character_tokenizer, new_model
from posttrain.schedules import learning_rate
from posttrain.stages.auxiliary import Auxiliary, auxiliary_rows
from posttrain.stages.batches import Batches, sequences
from posttrain.stages.context import Context
from posttrain.stages.learner import new_learner, steps_to_do
from posttrain.stages.settings.imitate import Pretrain
from posttrain.stages.sft import demonstrations, imitate


def run(config: Pretrain, ctx: Context) -> dict[str, float]:
    """Train a new model on documents, each a prompt and its demonstration in chat form."""
    demos = demonstrations(config, ctx)
    fields = ("prompt", "demo", "thought", "direct") if config.thinking else ("prompt", "demo")
    others = [auxiliary_rows(ctx, name, config.aux_modes.get(name, ())) for name in config.aux]
    every = [row for found in (demos, *others) for rows in found.values() for row in rows]
    tokenizer = character_tokenizer(
        (row[field] for row in every for field in fields if field in row), thinking=config.thinking
    )
    language_model = new_model(
        tokenizer,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        max_positions=config.max_positions,
        seed=config.seed,
    )
    language_model.model.to(ctx.device)
    chat = Chat(language_model)
    batches = Batches(demos, config, size="batch_size", stage=ctx.name)
    learner = new_learner(config, language_model, ctx)
    aux = Auxiliary(config, config.seed, ctx, chat, language_model.pad_id)
    for step, now in steps_to_do(config, ctx, learner, batches, config.steps):
        rows = batches.draw(now)
        prompts = [chat.prompt(row["prompt"], row.get("mode")) for row in rows]
        responses = [chat.response(row["prompt"], row["demo"], row.get("mode")) for row in rows]
        if config.loss_on == "all":
            # Everything but the first token is to be predicted.
            responses = [[*p[1:], *r] for p, r in zip(prompts, responses, strict=True)]
            prompts = [p[:1] for p in prompts]
        batch = sequences(prompts, responses, language_model.pad_id)
        lr = learning_rate(now, step, config.steps)
        metrics = imitate(learner, batch, lr=lr, also=aux.parts(step, now.aux))
        metrics |= now.scheduled()
        ctx.log(step + 1, config.steps, tokens=batch.num_tokens, **metrics)
        ctx.checkpoint(step + 1, learner)
    save(learner.result(), ctx.out)
    parameters = sum(parameter.numel() for parameter in language_model.model.parameters())
    return {"loss": ctx.metrics["loss"], "tokens": ctx.tokens, "parameters": parameters}
