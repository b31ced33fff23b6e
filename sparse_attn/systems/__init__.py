"""Block-sparse attention systems, one short file each, written over one grammar (`sparse_attn.grammar`).

A system is a frozen value that holds hyperparameters and is called like a function:

    from sparse_attn.systems.prism import Prism

    attention = Prism(high_threshold=0.9)
    output = attention(query, key, value)     # array like query
    choice = attention.select(query, key)     # a `LevelMap` (per tile) or a `BlockSelection` (per token)

Arrays are `[batch, sequence, heads, head_dim]`. Arrays that belong to a system, such as gates, follow value. Packed or
padded rows: `segment_ids` and `seq_lengths`, which most systems must know when they are traced. The base is
`sparse_attn.systems.system.System`; `docs/systems.md` has a card for every class that `find_systems` of
`sparse_attn.systems.__main__` lists.
"""
