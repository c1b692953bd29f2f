"""From logits to tokens: sample, verify_draft, apply_penalties, log_probs.

Logits are [B, V], one row a request; V is the vocabulary. Rows are ordered by logit, larger first, and equal logits by token
id, smaller first: greedy choice, top-k, top-p and ranks all follow this one order.

weight    exp((logit - largest logit) / temperature) as an integer, 2**40 for the largest: sums have no order (`_weights.py`).
mass      a sum of weights.
tile      128 consecutive ids of a row.
cut       where a filter ends in the order of a row: the last logit kept, and the last id kept among those equal to it.
turn      one draw from a whole row; top-p and min-p take the first turn whose id they keep.
"""
