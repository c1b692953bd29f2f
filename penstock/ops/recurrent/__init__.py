"""Recurrent mixers: the short causal convolution, Mamba-1's selective scan, Mamba-2's scan, and their single steps.

| file                    | public names         | kernels                        |
|-------------------------|----------------------|--------------------------------|
| causal_conv1d.py        | causal_conv1d        | causal_conv1d_triton.py        |
| causal_conv1d_update.py | causal_conv1d_update | causal_conv1d_update_triton.py |
| selective_scan.py       | selective_scan       | selective_scan_triton.py       |
| ssd_prefill.py          | ssd_prefill          | ssd_prefill_triton.py          |
| ssm_state_update.py     | ssm_state_update     | ssm_state_update_triton.py     |

Private files: _discretise.py (step sizes and gates, for the references and the CPU path), _chunked.py (Mamba-2's scan as matrix
products), _segments_triton.py (device functions shared by the kernels), _cases.py (drawing of test and benchmark inputs).

Layouts
    x, y, z       [T, C] or [T, H, P]: the tokens of all requests, one request after another ("packed", "varlen")
    cu_seqlens    [B+1]: request b owns rows cu_seqlens[b] to cu_seqlens[b+1]; rows after the last request give zeros
    B, C          [T, G, N]: shared by the H / G heads (or channels) of a group
    conv state    [slots, C, W-1]: the last W-1 inputs of a request, oldest first
    SSM state     [slots, H, P, N] or [B, C, N]: float32, or the dtype of x
    state_indices [B]: the slot of each request; -1 is padding: no state is read or written, its rows are zeros

Glossary
    step          dt after bias, softplus and limit: how far the state decays and how much of x it takes in
    chunk         the tokens that Mamba-2's scan computes as one matrix product
    segment       the chunks of one request that one program walks; a long request is cut into several
"""
