"""The paged key and value cache: store_kv writes it, gather_kv reads it back packed, copy_pages duplicates pages.

| file          | public names           |
|---------------|------------------------|
| layout.py     | KVLayout, KVCache      |
| store_kv.py   | store_kv               |
| gather_kv.py  | gather_kv              |
| copy_pages.py | copy_pages             |

A cache is logically [P, S, Hkv, D]: pages, slots of a page, heads, dimensions. Where its values lie is told by strides alone,
and every operator takes any. `KVLayout` allocates caches and names their orders, N for slot, H for head, D for dimension:

    NHD   slot, head, dimension: the order of the shape
    HND   head, slot, dimension: a head's rows of a page are one run
    HDN   head, dimension, slot: V transposed inside each page and head, for FP8 tensor cores, which read V along the keys

slot = page · S + offset; a negative slot is padding and writes nothing. `page_table[b, i]` is the page that holds tokens
i · S … i · S + S − 1 of request b; `cu_seqlens` are the running sums of lengths, from 0.

Scales of an FP8 cache (x ≈ stored · scale, float32), the same in every operator that writes or reads one:

    k_scale   [1] or [Hkv]    static, for the whole cache or for each head; format=FP8_TENSOR stores with it
              [P, S, Hkv]     of each token and head, a cache beside k_cache; format=FP8_TOKEN computes and stores it.
                              KVLayout keeps it head-major, so that a kernel reads the scales of a head's page as one run
    v_scale   [1] or [Hkv]    static always: a tensor core sums over keys, so their values must share a scale
    q_scale   [T, Hq]         of each token and head of quantised queries; or static, [1] or [Hq]

The scale cache goes through gather_kv and copy_pages as `k_scale.unsqueeze(-1)`.
"""
