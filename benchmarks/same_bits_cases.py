"""The stages that `same_bits.py` compares, as a recipe that makes any one of them.

    posttrain run benchmarks/same_bits_cases.py --set target=rl_cispo --suite /path/digits.toml

A case is a name and the text of an expression. In it every other case stands under its name, and so
do the verbs of the recipe, `domains`, `judges`, `schedules`, and what is in `posttrain.algorithms`
where there is such a module. A stage is called after its case. Where the language of settings has
changed, `AFTER` says the same in the new words; the numbers have to stay. Most settings are so
sharp, or steps so large, that each option of an algorithm changes some number.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

from posttrain import Recipe, judges, schedules

AFTER: dict[str, str] = {
    "two_updates": "dict(num_minibatches=2)",
    "three_updates": "dict(num_minibatches=3)",
    "many": "policy | two_updates | dict(lr=4e-3, lr_decay='constant')",
    "more": "policy | three_updates | dict(lr=4e-3, lr_decay='constant')",
    "pretrain_response": "pretrain(data=demos('general', noise=.3), loss_on='response', "
    "aux={'ptx': (demos('judging'), Aux(.5, batch_size=4))}, "
    "optimizer=AdamW(weight_decay=.1), lr_decay='linear', **size | learn | dict(steps=4))",
    "sft_lines": "sft(start=base, data=demos('general', noise=.3, hint='{prompt} {answer}'), "
    "epochs=.5, batch_size=16, lr=3e-3, lr_decay='constant')",
    "sft_aux": "sft(start=base, data=demos('reasoning'), aux={'ptx': (demos('judging'), "
    "Aux(.5, batch_size=8))}, optimizer=AdamW(ema=.9, max_grad_norm=.1), "
    "domain_shares={'reasoning': 1}, **learn)",
    "sft_scheduled": "sft(start=base, data=demos(domains), steps=3, "
    "batch_size=schedules.steps({0: 4, 1: 9}), lr=schedules.linear(3e-3, 1e-3), "
    "optimizer=AdamW(weight_decay=schedules.cosine(.1, 0., until=2)), aux={'ptx': "
    "(demos('judging'), schedules.linear(1., 0.))})",
    "correct": "select(sampled, how=Correct(2))",
    "top_share": "select(scored, how=TopShare(.3, by='score'))",
    "best_of": "select(scored, how=BestResponses(by='score'), max_tokens=3)",
    "of_rl": "select(rl_plain, how=AllResponses(1, success=True), first_step=1)",
    "distinct_near": "dedup(mixed_rows, near=Near(.5, 3))",
    "preferred": "pairs(sampled, how=BestAgainstWorst(2))",
    "preferred_oracle": "pairs(sampled, judge=judges.oracle(noise=.5), how=RandomPairs(3))",
    "preferred_all": "pairs(scored, how=AllPairs(by='score', min_margin=.5))",
    "preferred_strong": "pairs(sampled, against=sampled_top, how=StrongAgainstWeak(2))",
    "dpo_sigmoid": "dpo(loss=Dpo(beta=.2, label_smoothing=.1), **prefer)",
    "dpo_length": "dpo(loss=DpoNorm(beta=5., nll_weight=.2), **prefer)",
    "dpo_simpo": "dpo(loss=SimPO(beta=2., gamma=.7), mask_formatting=True, **prefer)",
    "dpo_ipo": "dpo(loss=Ipo(nll_weight=.1), aux={'ptx': (demos('judging'), Aux(.5, "
    "batch_size=4))}, **prefer)",
    "dpo_kto": "dpo(loss=Kto(desirable_weight=1.3, undesirable_weight=.7), **prefer)",
    "dpo_reference": "dpo(start=sft_plain, reference=base, data=preferred_oracle, epochs=.5, "
    "batch_size=8, lr=3e-3, loss=Dpo(schedules.linear(.1, .3)), mask_formatting=True)",
    "rm_margins": "reward_model(start=base, data=preferred_oracle, "
    "loss=BradleyTerry(margins='strength', centring=.01), **learn)",
    "rl_batch": "rl(advantage='batch', aggregation=ConstantSum(3), **policy)",
    "rl_gae": "rl(advantage=Gae(lam=.9, gamma=.98), **policy)",
    "rl_gae_clipped": "rl(advantage=Gae(critic_lr=5e-3, value_clip=.05, warmup_steps=1), **many)",
    "rl_gae_unclipped": "rl(advantage=Gae(value_clip=None), critic=sft_plain, **many)",
    "rl_gae_rewards": "rl(advantage='gae', critic=rm_plain, reward=judges.scalar(rm_plain), "
    "kl=KL(.05, where='reward', estimator='k1'), **many)",
    "rl_clip": "rl(surrogate=Clip(.1, .05), **more)",
    "rl_clip_dual": "rl(surrogate=Clip(clip_high=.3, dual_clip=1.02), **more | dict(lr=2e-2))",
    "rl_clip_sequence": "rl(surrogate=Clip(.02, .03, ratio='sequence'), "
    "aggregation='sequence', **many)",
    "rl_clip_product": "rl(surrogate=Clip(ratio='product'), **many)",
    "rl_cispo": "rl(surrogate=Cispo(1., .05), **more)",
    "rl_cispo_sequence": "rl(surrogate=Cispo(clip_high=.02, ratio='sequence'), **many)",
    "rl_cispo_product": "rl(surrogate=Cispo(clip_high=.01, ratio='product'), "
    "correction=Truncated(1.1), **unlike)",
    "rl_geometric": "rl(surrogate=Gmpo(.03, .05), **many)",
    "rl_squared": "rl(surrogate=Kimi(.5), advantage='group_mean', **many)",
    "rl_once": "rl(surrogate=Clip(ratio='sequence'), correction=Truncated(1.), top_p=.8, "
    "replay_mask=False, **policy)",
    "rl_delta": "rl(surrogate=Cispo(clip_low=1.), off_policy_delta=.001, **more)",
    "rl_truncated": "rl(correction=Truncated(1.), **rounded)",
    "rl_icepop": "rl(correction=IcePop(.85, 1.1), **unlike)",
    "rl_truncated_rows": "rl(correction=Truncated(1., sequence=True), **rounded)",
    "rl_icepop_rows": "rl(correction=IcePop(.7, 1.2, sequence=True), **unlike)",
    "rl_kl": "rl(kl=KL(.5, domains={'reasoning': .1}), **many)",
    "rl_kl_k2": "rl(kl=KL(.5, estimator='k2', reference_every=2), **many)",
    "rl_kl_unbiased": "rl(kl=KL(.5, estimator='unbiased'), **many)",
    "rl_kl_reward": "rl(kl=KL(.1, where='reward', estimator='k1', domains={'general': 2}, "
    "reference_every=1), advantage='global', **policy)",
    "rl_kl_reward_k2": "rl(kl=KL(.1, where='reward', estimator='k2'), **policy)",
    "rl_kl_reward_k3": "rl(kl=KL(.1, where='reward', estimator='k3'), **many)",
    "rl_top_p": "rl(top_p=.7, temperature=.9, kl=KL(.1), **many)",
    "rl_top_p_unmasked": "rl(kl=KL(.1), **unlike)",
    "rl_dynamic": "rl(draw=InTurn(dynamic_sampling=2, retire_above=.5), **policy | "
    "dict(prompts_per_step=12, steps=4))",
    "rl_band": "rl(profile=profiled, draw=Band(.2, schedules.linear(.9, .6, until=2), "
    "update_rates=True), **policy)",
    "rl_gaussian": "rl(profile=profiled, draw=Gaussian(schedules.linear(.8, .4, until=2), .1, "
    "reprofile=Reprofile(every=1, samples=4, prompts=10)), **policy)",
    "rl_plateau": "rl(profile=profiled, draw=Gaussian(reprofile=Reprofile(on_plateau=1, "
    "samples=2, prompts=8)), **policy | dict(steps=4))",
    "rl_scheduled": "rl(surrogate=Clip(clip_high=schedules.track('entropy', target=1., "
    "first=.02, change=.01, low=.01, high=.04)), kl=KL(schedules.steps({0: .1, 2: 0.})), "
    "temperature=schedules.linear(1., .7), domain_shares=schedules.steps({0: {'reasoning': 1, "
    "'general': 1}, 2: {'reasoning': 1, 'general': 0}}), **many | dict(steps=4, "
    "lr=schedules.steps({0: 1e-3, 1: 4e-3}), max_new_tokens=schedules.alternate(4, 2, "
    "every=1), group_size=schedules.steps({0: 4, 2: 6})))",
    "rl_scheduled_gae": "rl(advantage=Gae(lam=schedules.linear(1., .5), "
    "critic_lr=schedules.linear(1e-3, 5e-3), value_clip=schedules.steps({0: .02, 1: .05})), "
    "**many)",
    "rl_critique": "rl(critique=Critique(.5, pairs=1, domains=['general']), **many)",
    "rl_aux": "rl(aux={'ptx': (demos('judging'), Aux(.5, batch_size=6)), 'own': (correct, "
    "Aux(.1, batch_size=6))}, optimizer=AdamW(ema=.9, weight_decay=.1), trainable=['*attn*', "
    "'*norm*'], **many)",
    "rl_bfloat16": "rl(precision='bfloat16', kl=KL(.1), correction='truncated', **many)",
    "full_forward": "distill(estimator='forward_kl', aggregation='token', balance='tokens', "
    "domain_shares={'reasoning': 1, 'general': 3}, **student)",
    "full_jsd": "distill(estimator=Jsd(schedules.linear(.2, .8)), aggregation='constant', "
    "domain_weights={'reasoning': .5}, **student | two_updates)",
    "full_cached": "distill(estimator=ReverseKL(cache='bfloat16'), temperature=.8, **student "
    "| two_updates)",
    "full_rewarded": "distill(reward_weight=.5, samples_per_prompt=3, "
    "correction=Truncated(1.01), **student | two_updates | dict(lr=2e-2))",
    "full_aux": "distill(aux={'ptx': (demos('judging'), Aux(.5, batch_size=4))}, "
    "optimizer=AdamW(ema=.9), **student)",
    "top_k": "distill(estimator=TopK(8), **student | two_updates)",
    "sampled_token": "distill(estimator=SampledToken(1.), **student)",
    "sampled_token_icepop": "distill(estimator=SampledToken(None), "
    "reward_weight=schedules.linear(0., 1.), samples_per_prompt=4, correction=IcePop(.9, "
    "1.1), aggregation='token', balance='tokens', **student | two_updates)",
    "sampled_token_thrice": "distill(estimator='sampled_token', correction=Truncated(1.1), "
    "**student | three_updates | dict(lr=2e-2))",
    "merge_arithmetic": "merge(learned, base=base, how=TaskArithmetic(.8))",
    "merge_ties": "merge(learned, base=base, how=Ties(.4))",
    "merge_dare": "merge(learned, base=base, how=DareLinear(.5))",
    "merge_dare_ties": "merge(learned, base=base, how=DareTies(.5))",
    "best_greedy": "best(learned, prompts=both, samples=0, **measure)",
}
"""Case to its expression in the newer language, where that is another one than in `BEFORE`."""

BEFORE: dict[str, str] = {
    # -- what several cases share ------------------------------------------------------------------
    "both": "prompts(['reasoning', 'general'])",
    "thought": "prompts(['reasoning', 'general'], mode=['think', 'no_think'])",
    "few": "dict(num_prompts=12, max_new_tokens=4)",
    "size": "dict(hidden_size=32, num_layers=2, num_heads=2, head_dim=16, intermediate_size=64)",
    "learn": "dict(steps=3, lr=3e-3, warmup_steps=1, batch_size=8)",
    "rollout": "dict(steps=3, lr=3e-3, warmup_steps=1, max_new_tokens=4)",
    "group": "dict(prompts_per_step=6, group_size=4) | rollout",
    "policy": "dict(start=base, prompts=both) | group",
    "two_updates": "dict(updates_per_batch=2)",
    "three_updates": "dict(updates_per_batch=3)",
    # So much per update that ratios leave their bounds.
    "many": "policy | two_updates | dict(lr=4e-3, lr_schedule='constant')",
    "more": "policy | three_updates | dict(lr=4e-3, lr_schedule='constant')",
    # The sampler has another distribution than the policy, so that there is something to correct.
    "unlike": "many | dict(top_p=.8, replay_mask=False)",
    "rounded": "many | dict(precision='bfloat16')",
    "student": "dict(start=base, prompts=both, teachers=two, prompts_per_step=8) | rollout",
    "two": "{'reasoning': sft_plain, 'general': sft_lines}",
    "ptx": "{'ptx': (demos('judging'), .5)}",
    # -- pretrain and sft --------------------------------------------------------------------------
    "base": "pretrain(data=demos(domains), steps=120, lr=5e-3, batch_size=32, **size)",
    "thinker": "pretrain(data=demos(domains[:2], mode=('think', 'no_think')), thinking=True, "
    "steps=120, lr=5e-3, batch_size=32, **size)",
    "pretrain_response": "pretrain(data=demos('general', noise=.3), loss_on='response', aux=ptx, "
    "aux_batch_size=4, weight_decay=.1, lr_schedule='linear', **size | learn | dict(steps=4))",
    "sft_plain": "sft(start=base, data=demos('reasoning'), **learn)",
    "sft_lines": "sft(start=base, data=demos('general', noise=.3, hint='{prompt} {answer}'), "
    "epochs=.5, batch_size=16, lr=3e-3, lr_schedule='constant')",
    "sft_aux": "sft(start=base, data=demos('reasoning'), aux=ptx, aux_batch_size=8, ema=.9, "
    "domain_shares={'reasoning': 1}, max_grad_norm=.1, **learn)",
    "sft_trainable": "sft(start=base, data=demos(domains), trainable=['*mlp*', '*norm*'], "
    "domain_shares={'reasoning': 3, 'general': 1, 'judging': 0}, **learn)",
    "sft_modes": "sft(start=thinker, data=demos('general', mode=('think', 'no_think')), **learn)",
    "sft_scheduled": "sft(start=base, data=demos(domains), steps=3, batch_size=schedules.steps({0: "
    "4, 1: 9}), lr=schedules.linear(3e-3, 1e-3), weight_decay=schedules.cosine(.1, 0.), "
    "aux={'ptx': (demos('judging'), schedules.linear(1., 0.))})",
    "sft_bfloat16": "sft(start=base, data=demos('reasoning'), precision='bfloat16', **learn)",
    "sft_mix": "sft(start=base, data=mixed, **learn)",
    # -- rows of data ------------------------------------------------------------------------------
    "sampled": "sample(base, prompts=both, k=6, **few)",
    "sampled_top": "sample([base, sft_plain], prompts=both, k=3, temperature=.8, top_p=.9, "
    "first_prompt=5, prefix='1', **few)",
    "sampled_modes": "sample(thinker, prompts=thought, k=2, num_prompts=6, max_new_tokens=8)",
    "sampled_routed": "sample({'reasoning': sft_plain, 'general': [base, sft_lines]}, "
    "prompts=both, k=4, **few)",
    "scored": "score(sampled, judge=judges.oracle() - .1 * judges.length(budget=2))",
    "scored_compare": "score(sampled_routed, judge=judges.compare(base, pairing='circular'))",
    "correct": "select(sampled, max_per_prompt=2)",
    "shortest": "select([sampled, sampled_top], how='shortest_correct')",
    "top_share": "select(scored, how='top_share', by='score', share=.3)",
    "best_of": "select(scored, how='best', by='score', max_tokens=3)",
    "of_rl": "select(rl_plain, how='all', first_step=1, success=True, max_per_prompt=1)",
    "stripped": "select(sampled_modes, how='all', strip_thought=True)",
    "compared": "comparisons(sampled, max_per_prompt=1, template='{a} or {b} {prompt}')",
    "mixed": "mix({top_share: 1, demos('judging', noise=.1): 2}, by='tokens', tokenizer=base)",
    "mixed_rows": "mix({correct: 3, demos('general'): 1}, rows=40)",
    "distinct": "dedup([mixed, mixed_rows], of='prompt')",
    "distinct_near": "dedup(mixed_rows, near=.5, ngram=3)",
    "profiled": "profile(base, prompts=both, n=4, num_prompts=100, max_new_tokens=4)",
    "profiled_sft": "profile(sft_plain, prompts=both, n=4, num_prompts=100, max_new_tokens=4)",
    "filtered": "filter(both, profile=profiled, low=.3, high=.8, keep_unsolved=.2, at_least=85)",
    "filtered_gain": "filter(both, profile=profiled_sft, against=profiled, min_gain=.1)",
    "preferred": "pairs(sampled, max_per_prompt=2)",
    "preferred_oracle": "pairs(sampled, judge=judges.oracle(noise=.5), how='random', "
    "max_per_prompt=3)",
    "preferred_all": "pairs(scored, how='all', by='score', min_margin=.5)",
    "preferred_judge": "pairs(sampled, judge=judges.verifier() - .1 * judges.length(budget=2))",
    "preferred_strong": "pairs(sampled, against=sampled_top, max_per_prompt=2)",
    # -- dpo and reward models ---------------------------------------------------------------------
    "prefer": "dict(start=base, data=preferred) | learn",
    "dpo_sigmoid": "dpo(beta=.2, label_smoothing=.1, **prefer)",
    "dpo_length": "dpo(loss='length_normalised', beta=5., nll_weight=.2, **prefer)",
    "dpo_simpo": "dpo(loss='simpo', beta=2., gamma=.7, mask_formatting=True, **prefer)",
    "dpo_ipo": "dpo(loss='ipo', nll_weight=.1, aux=ptx, aux_batch_size=4, **prefer)",
    "dpo_kto": "dpo(loss='kto', desirable_weight=1.3, undesirable_weight=.7, **prefer)",
    "dpo_reference": "dpo(start=sft_plain, reference=base, data=preferred_oracle, epochs=.5, "
    "batch_size=8, lr=3e-3, beta=schedules.linear(.1, .3), mask_formatting=True)",
    "dpo_bfloat16": "dpo(precision='bfloat16', **prefer)",
    "rm_plain": "reward_model(start=base, data=preferred, **learn)",
    "rm_margins": "reward_model(start=base, data=preferred_oracle, margins='strength', "
    "centring=.01, **learn)",
    "rm_pointwise": "reward_model(start=base, data=preferred_judge, loss='pointwise', holdout=.3, "
    "**learn)",
    "rm_per_prompt": "reward_model(start=rm_plain, data=preferred_all, per_prompt=True, **learn)",
    # -- rl: advantages ----------------------------------------------------------------------------
    "rl_plain": "rl(**policy)",
    "rl_group_mean": "rl(advantage='group_mean', aggregation='sequence', **policy)",
    "rl_leave_one_out": "rl(advantage='leave_one_out', aggregation='constant', **policy)",
    "rl_batch": "rl(advantage='batch', aggregation='constant', aggregation_constant=3, **policy)",
    "rl_global": "rl(advantage='global', **policy | dict(group_size=1))",
    "rl_gae": "rl(advantage='gae', gae_lambda=.9, gae_gamma=.98, **policy)",
    "rl_gae_clipped": "rl(advantage='gae', critic_lr=5e-3, value_clip=.05, critic_warmup_steps=1, "
    "**many)",
    "rl_gae_unclipped": "rl(advantage='gae', critic=sft_plain, value_clip=None, **many)",
    "rl_gae_rewards": "rl(advantage='gae', critic=rm_plain, reward=judges.scalar(rm_plain), "
    "kl_coef=.05, kl_in='reward', kl_estimator='k1', **many)",
    # -- rl: surrogates and ratios -----------------------------------------------------------------
    "rl_clip": "rl(clip_low=.1, clip_high=.05, **more)",
    "rl_clip_dual": "rl(clip_high=.3, dual_clip=1.02, **more | dict(lr=2e-2))",
    "rl_clip_sequence": "rl(ratio='sequence', clip_low=.02, clip_high=.03, "
    "aggregation='sequence', **many)",
    "rl_clip_product": "rl(ratio='product', **many)",
    "rl_cispo": "rl(surrogate='cispo', clip_low=1., clip_high=.05, **more)",
    "rl_cispo_sequence": "rl(surrogate='cispo', ratio='sequence', clip_high=.02, **many)",
    "rl_cispo_product": "rl(surrogate='cispo', ratio='product', clip_high=.01, "
    "correction='truncated', correction_high=1.1, **unlike)",
    "rl_geometric": "rl(surrogate='geometric_mean', clip_low=.03, clip_high=.05, **many)",
    "rl_squared": "rl(surrogate='squared', tau=.5, advantage='group_mean', **many)",
    "rl_once": "rl(ratio='sequence', correction='truncated', correction_high=1., top_p=.8, "
    "replay_mask=False, **policy)",
    "rl_delta": "rl(surrogate='cispo', clip_low=1., off_policy_delta=.001, **more)",
    # -- rl: corrections ---------------------------------------------------------------------------
    "rl_truncated": "rl(correction='truncated', correction_high=1., **rounded)",
    "rl_icepop": "rl(correction='icepop', correction_low=.85, correction_high=1.1, **unlike)",
    "rl_truncated_rows": "rl(correction='sequence_truncated', correction_high=1., **rounded)",
    "rl_icepop_rows": "rl(correction='sequence_icepop', correction_low=.7, correction_high=1.2, "
    "**unlike)",
    # -- rl: divergence from the reference ---------------------------------------------------------
    "rl_kl": "rl(kl_coef=.5, domain_kl={'reasoning': .1}, **many)",
    "rl_kl_k2": "rl(kl_coef=.5, kl_estimator='k2', reference_every=2, **many)",
    "rl_kl_unbiased": "rl(kl_coef=.5, kl_estimator='unbiased', **many)",
    "rl_kl_reward": "rl(kl_coef=.1, kl_in='reward', kl_estimator='k1', advantage='global', "
    "domain_kl={'general': 2}, reference_every=1, **policy)",
    "rl_kl_reward_k2": "rl(kl_coef=.1, kl_in='reward', kl_estimator='k2', **policy)",
    "rl_kl_reward_k3": "rl(kl_coef=.1, kl_in='reward', kl_estimator='k3', **many)",
    # -- rl: what is drawn, and what is left out ---------------------------------------------------
    "rl_top_p": "rl(top_p=.7, temperature=.9, kl_coef=.1, **many)",
    "rl_top_p_unmasked": "rl(kl_coef=.1, **unlike)",
    "rl_unfinished": "rl(mask_unfinished=True, drop_zero_variance=False, **policy | "
    "dict(max_new_tokens=2))",
    "rl_dynamic": "rl(dynamic_sampling=2, retire_above=.5, "
    "**policy | dict(prompts_per_step=12, steps=4))",
    "rl_band": "rl(profile=profiled, curriculum='band', band_low=.2, band_high=schedules.linear(.9,"
    " .6), update_rates=True, **policy)",
    "rl_gaussian": "rl(profile=profiled, curriculum='gaussian', target_rate=schedules.linear(.8, "
    ".4), spread=.1, reprofile_every=1, reprofile_samples=4, reprofile_prompts=10, **policy)",
    "rl_plateau": "rl(profile=profiled, curriculum='gaussian', reprofile_on_plateau=1, "
    "reprofile_samples=2, reprofile_prompts=8, **policy | dict(steps=4))",
    "rl_filtered": "rl(**policy | dict(prompts=filtered))",
    "rl_modes": "rl(**policy | dict(start=thinker, prompts=thought, max_new_tokens=8))",
    "rl_scheduled": "rl(clip_high=schedules.track('entropy', target=1., first=.02, change=.01, "
    "low=.01, high=.04), kl_coef=schedules.steps({0: .1, 2: 0.}), temperature=schedules.linear(1., "
    ".7), domain_shares=schedules.steps({0: {'reasoning': "
    "1, 'general': 1}, 2: {'reasoning': 1, 'general': 0}}), **many | dict(steps=4, "
    "lr=schedules.steps({0: 1e-3, 1: 4e-3}), max_new_tokens=schedules.alternate(4, 2, every=1), "
    "group_size=schedules.steps({0: 4, 2: 6})))",
    "rl_scheduled_gae": "rl(advantage='gae', gae_lambda=schedules.linear(1., .5), critic_lr="
    "schedules.linear(1e-3, 5e-3), value_clip=schedules.steps({0: .02, 1: .05}), **many)",
    # -- rl: rewards, and losses beside ------------------------------------------------------------
    "rl_judges": "rl(reward=judges.verifier() + .5 * judges.scalar(rm_margins, squash=True) - .1 * "
    "judges.length(budget=2), **policy)",
    "rl_judges_more": "rl(reward=judges.by_domain({'reasoning': judges.gate(judges.scalar(rm_plain)"
    ", below=0., then=judges.scalar(rm_plain), otherwise=judges.constant(1.)), 'general': judges."
    "lexicographic(judges.verifier(), judges.oracle()) + judges.finished()}), **policy)",
    "rl_judges_group": "rl(reward=judges.normalised(judges.verifier(), judges.scalar(rm_pointwise))"
    " + judges.whitened(judges.oracle()) - schedules.linear(0., .2) * judges.repetition(n=1, "
    "unit='character') - .1 * judges.length(budget=3, shape='pass_rate'), **policy)",
    "rl_judges_compare": "rl(reward=judges.compare(sft_lines, swap=False), **policy)",
    "rl_judges_itself": "rl(reward=judges.itself(pairing='circular') + judges.verifier(), "
    "**policy)",
    "rl_critique": "rl(critique_weight=.5, critique_pairs=1, critique_domains=['general'], **many)",
    "rl_aux": "rl(aux=ptx | {'own': (correct, .1)}, aux_batch_size=6, ema=.9, trainable=['*attn*', "
    "'*norm*'], weight_decay=.1, **many)",
    "rl_bfloat16": "rl(precision='bfloat16', kl_coef=.1, correction='truncated', **many)",
    # -- distill -----------------------------------------------------------------------------------
    "full_reverse": "distill(**student)",
    "full_forward": "distill(divergence='forward_kl', aggregation='token', balance='tokens', "
    "domain_shares={'reasoning': 1, 'general': 3}, **student)",
    "full_jsd": "distill(divergence='jsd', jsd_beta=schedules.linear(.2, .8), "
    "aggregation='constant', domain_weights={'reasoning': .5}, **student | two_updates)",
    "full_cached": "distill(teacher_cache='bfloat16', temperature=.8, **student | two_updates)",
    "full_several": "distill(**student | dict(teachers={'reasoning': [sft_plain, rl_plain, 'self'],"
    " 'general': rl_cispo}, samples_per_prompt=2))",
    "full_rewarded": "distill(reward_weight=.5, samples_per_prompt=3, correction='truncated', "
    "correction_high=1.01, **student | two_updates | dict(lr=2e-2))",
    "full_hints": "distill(hints={'general': '{prompt} {answer}'}, **student | "
    "dict(teachers={'general': 'self', 'reasoning': sft_plain}))",
    "full_modes": "distill(**student | dict(start=thinker, prompts=thought, teachers={'reasoning': "
    "{'think': sft_modes, 'no_think': rl_modes}, 'general': sft_modes}))",
    "full_aux": "distill(aux=ptx, aux_batch_size=4, ema=.9, **student)",
    "full_bfloat16": "distill(precision='bfloat16', **student)",
    "top_k": "distill(estimator='top_k', top_k=8, **student | two_updates)",
    "sampled_token": "distill(estimator='sampled_token', advantage_clip=1., **student)",
    "sampled_token_icepop": "distill(estimator='sampled_token', advantage_clip=None, "
    "reward_weight=schedules.linear(0., 1.), samples_per_prompt=4, correction='icepop', "
    "correction_low=.9, correction_high=1.1, aggregation='token', balance='tokens', "
    "**student | two_updates)",
    # No correction of whole responses: at 8499444 it fails in distill, which gives it no rows.
    "sampled_token_thrice": "distill(estimator='sampled_token', correction='truncated', "
    "correction_high=1.1, **student | three_updates | dict(lr=2e-2))",
    # -- models out of models, and measuring -------------------------------------------------------
    "learned": "[sft_plain, rl_clip, full_reverse]",
    "merge_average": "merge({'a': sft_plain, 'b': rl_clip}, weights={'b': 2})",
    "merge_arithmetic": "merge(learned, base=base, how='task_arithmetic', scale=.8)",
    "merge_ties": "merge(learned, base=base, how='ties', density=.4)",
    "merge_dare": "merge(learned, base=base, how='dare_linear', density=.5)",
    "merge_dare_ties": "merge(learned, base=base, how='dare_ties', density=.5)",
    "measure": "dict(num_problems=20, max_new_tokens=4, bootstrap=100)",
    "best_accuracy": "best(learned, prompts=both, length_weight=.1, **measure)",
    "best_greedy": "best(learned, prompts=both, metric='greedy', **measure)",
    "best_judged": "best(learned, prompts=both, judge=judges.scalar(rm_plain), **measure)",
    "evaluated": "evaluate(full_reverse, init=base, teachers=two, domains=['reasoning', 'general'],"
    " transcripts=2, **measure)",
    "evaluated_modes": "evaluate(full_modes, init=thinker, domains=['reasoning', 'general'], "
    "modes=('think', 'no_think'), split='validation', samples=1, **measure)",
}

MODELS = ["pretrain", "sft", "dpo", "reward_model", "rl", "distill", "merge", "best", "evaluate"]
ROWS = ["sample", "score", "select", "pairs", "profile", "filter", "mix", "dedup", "comparisons"]
STAGES = frozenset([*MODELS, *ROWS])
"""The verbs that make a stage."""


def cases() -> dict[str, str]:
    """Name to kind of every case that is a stage."""
    verbs = {name: text.partition("(")[0] for name, text in BEFORE.items()}
    return {name: verb for name, verb in verbs.items() if verb in STAGES}


class Names(dict[str, Any]):
    """What the names in the expressions stand for; a case is built when it is first named."""

    def __init__(self, r: Recipe, side: str) -> None:
        super().__init__(judges=judges, schedules=schedules, domains=r.domains)
        self._recipe = r
        self._texts = BEFORE | AFTER if side == "after" else BEFORE

    def __missing__(self, name: str) -> Any:
        if name in self._texts:
            self[name] = eval(self._texts[name], {}, _Of(self, name))
        elif name in ("prompts", "demos"):
            self[name] = getattr(self._recipe, name)
        else:
            # Raises KeyError, and so eval looks among Python's own names.
            self[name] = _algorithm(name)
        return self[name]

    def verb(self, kind: str, case: str) -> Callable[..., Any]:
        """The verb of a kind, calling its stage after the case."""
        return partial(getattr(self._recipe, kind), name=case)


class _Of(dict[str, Any]):
    """The names as one case sees them."""

    def __init__(self, names: Names, case: str) -> None:
        super().__init__()
        self._names, self._case = names, case

    def __missing__(self, name: str) -> Any:
        # The verb first: `filter` is a function of Python's, too.
        return self._names.verb(name, self._case) if name in STAGES else self._names[name]


def _algorithm(name: str) -> Any:
    try:
        return getattr(importlib.import_module("posttrain.algorithms"), name)
    except (ImportError, AttributeError):
        raise KeyError(name) from None


def recipe(r: Recipe, target: str = "evaluated", side: str = "before") -> Any:
    """The stage of one case and all that it needs."""
    return Names(r, side)[target]
