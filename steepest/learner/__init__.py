"""Training: log-prob and value passes, updates, optimizer, schedule and checkpoints.

    update_plan.py    which rows each rank sends through the model in each pass, decided before any model runs
    micro_batches.py  which rows go through the model together
    mini_batches.py   which rows share an optimizer step
    optim.py          AdamW, learning-rate schedule, gradient clipping
    trainable.py      what actor, critic, reference and SFT share: device, compute dtype, passes, steps, arithmetic
    actor.py critic.py reference.py shared_critic.py supervised.py
    checkpoint.py     the store: atomic save, latest valid, best, pruning; checkpoint_files.py below it
    rng.py            every random state as plain JSON

This file imports nothing, so that the checkpoint store can be used without torch.
"""
