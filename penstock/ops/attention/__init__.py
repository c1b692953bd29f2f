"""Attention: prefill over packed requests, decode over a paged cache, and the merging of partial results.

| file             | public names                                  | kernels                |
|------------------|-----------------------------------------------|------------------------|
| prefill.py       | attention_prefill                             | prefill_triton.py      |
| prefill_paged.py | attention_prefill_paged                       | prefill_triton.py      |
| decode.py        | attention_decode                              | decode_triton.py       |
|                  |                                               | decode_hopper.py       |
| decode_plan.py   | attention_decode_plan, DecodePlan             | decode_plan_triton.py  |
| merge.py         | merge_attention                               | merge_triton.py        |

Private files: _options.py (contract rules shared by the operators), _reference.py (the definition, and the naive computation
that sets the error budget), _cpu.py and decode_cpu.py (the CPU path), _cases.py (drawing of test and benchmark inputs, cost of
a call), _softmax_triton.py (device functions shared by the kernels), decode_work_hopper.py and decode_gather_hopper.py (what a
program of decode_hopper.py works on, and what leaves it).

Layouts
    q, out        [T, Hq, D]: the tokens of all requests, one request after another ("packed", "varlen")
    k, v          [T, Hkv, D]: likewise
    cu_seqlens    [B+1]: request b owns rows cu_seqlens[b] to cu_seqlens[b+1]
    k_cache       [P, S, Hkv, D]: pages of S slots; NHD and HND differ by strides alone
    page_table    [B, max_pages]: key j of request b stands in page page_table[b, j // S], slot j % S
    lse           [T, Hq]: natural logarithm of the softmax's denominator, the sink included; -inf where no key is visible

Glossary
    group         Hq / Hkv query heads that read one KV head
    visible       query i of a request sees keys i + k_len - q_len - left to i + k_len - q_len + right; causal is right = 0
    window        (left, right), -1 for no limit
    softcap       s becomes softcap · tanh(s / softcap), before the mask
    sink          a logit per query head that takes part in the denominator and has no value
    tile          64 consecutive keys of one request: the unit of work of the decode schedule
    piece         the tiles of one request that one program of the decode kernel owns
"""
