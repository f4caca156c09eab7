# my_reward.py
import re


def compute_score(solution_str, ground_truth, extra_info):
    """1 when the last number of the response is right, and a little for any number at all."""
    numbers = re.findall(r"-?\d+", solution_str)
    right = bool(numbers) and numbers[-1] == ground_truth
    return {"score": 1.0 if right else 0.1 * bool(numbers), "acc": right, "hard": extra_info["level"] == "hard"}


def short(completions, **kwargs):
    """The same form as TRL's: lists of responses in, a list of numbers out."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [-len(text) / 1000 for text in texts]
