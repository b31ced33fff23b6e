"""Block-sparse attention systems, one short file each, written over one grammar (`sparse_attn.grammar`).

Every module has the same three names, and a function more where the system has one:

    RECIPE       what the system is made of, in words
    select       query, key and options -> the choice: a `LevelMap` (per tile) or a `BlockSelection` (per token)
    attention    query, key, value and options -> array like query

Arrays are `[batch, sequence, heads, head_dim]` and keyword names are those of `sparse_attn.moba_attention`. Rows are
whole sequences: a caller with packed or padded rows splits them first, except in MoBA and FlashMoBA.
"""
