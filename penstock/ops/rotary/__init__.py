"""Rotary position embedding: rope applies a table to queries and keys, rope_table builds the table of a model.

rope_norm_store_kv does all that stands between the projection to q, k, v and attention: per-head norms, rotation, an optional
Hadamard transform, optional quantisation and the paged store, in one pass over memory.

The table, `cos_sin`, is float32 [max_position, R]: row p holds cos(p · f_0) … cos(p · f_{R/2-1}), then the R/2 sines, times
the attention factor where the scaling has one (YaRN, LongRoPE). R ≤ D is the number of rotated dimensions of a head; the
others pass through. Every scaling variant lives in the table, so one operator serves them all.

NeoX halves (interleaved=False): dimension i is rotated with i + R/2. Interleaved pairs: 2i with 2i + 1.
"""
