"""What writes the masks of a batch: scores and failures, row selection, rollout correction."""

from __future__ import annotations

from functools import partial

from mutations.mutation import Mutation

_experience = partial(Mutation, room="trainer/experience")
_algorithm = partial(Mutation, room="trainer/algorithm")

MUTATIONS = [
    _experience("scoring.py", "last = batch.last_policy_token", "last = batch.response_lengths - 1",
                "the score on tool output"),
    _experience("scoring.py", "batch.leave_out(failed, RowStatus.REWARD_FAILED)", "pass", "a failed reward is a 0"),
    _experience("scoring.py", "batch.leave_out(failed, RowStatus.REWARD_FAILED)",
                "batch.leave_out(~failed, RowStatus.REWARD_FAILED)", "the rows that were scored are left out"),
    _experience("greedy_baseline.py", "batch.leave_out(baselines.isnan(), RowStatus.REWARD_FAILED)", "pass",
                "a failed baseline is trained"),
    _algorithm("row_selection.py", "batch.leave_out(batch.truncated, RowStatus.TRUNCATED)",
               "batch.leave_out(~batch.truncated, RowStatus.TRUNCATED)", "ended responses are left out"),
    _algorithm("row_selection.py", "batch.leave_out(equal, RowStatus.EQUAL_GROUP)", "pass", "equal groups are trained"),
    _algorithm("row_selection.py", "counted = batch.trained_mask.any(1)", "counted = batch.response_mask.any(1)",
               "rows that failed make a group vary"),
    _algorithm("correction.py", "mask.any(1) & ~found.kept.any(1), RowStatus.REJECTED",
               "~found.kept.any(1), RowStatus.REWARD_FAILED", "rejected rows under another reason"),
    _algorithm("correction.py", "batch.loss_mask & found.kept, found.weights", "batch.loss_mask, found.weights",
               "rejected tokens in the losses"),
]  # fmt: skip
