"""The paged key and value cache: store_kv writes it, gather_kv reads it back packed, copy_pages duplicates pages.

A cache is logically [P, S, Hkv, D]: pages, slots of a page, heads, dimensions. NHD (slot before head) and HND (head before
slot) differ by strides alone, and every operator takes both:

    nhd = torch.empty(P, S, Hkv, D)
    hnd = torch.empty(P, Hkv, S, D).transpose(1, 2)

slot = page · S + offset; a negative slot is padding and writes nothing. `page_table[b, i]` is the page that holds tokens
i · S … i · S + S − 1 of request b; `cu_seqlens` are the running sums of lengths, from 0.
"""
