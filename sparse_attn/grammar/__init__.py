"""The parts that block-sparse attention systems are made of: When / Order / Blocks -> Describe -> Score -> Choose ->
Attend -> Rest -> Merge.

    order      permutations of tokens that bring related ones together: boxes, a space-filling curve, sorted segments
    describe   one vector (or several) for a block of tokens
    score      how well a query block (or token) matches a key block: float32 `[batch, heads, query_blocks, key_blocks]`
    choose     scores -> bool masks of the same shape; a `LevelMap` says what each pair of blocks then gets
    attend     exact softmax attention over the chosen pairs -> `Partial`
    rest       an approximation of what was not chosen -> `Partial`
    merge      partials over disjoint keys add up to one softmax (`sparse_attn.attend.partial`)

A system (`sparse_attn.systems`) is a value whose methods string such functions together. Three types pass between the
parts: `LevelMap` (choices of query tiles) or `BlockSelection` (choices of query tokens) from Choose, `Blocks` for who
may see whom, and `Partial` from Attend and Rest. `Grid` has what many choices force: first blocks and diagonals.

Rules that every part keeps: scores and softmax are float32; -inf marks a pair that cannot be chosen; ties go to the
lower block index; no choice crosses the rows of a batch, and none carries a gradient.

Names of einsum axes, here and in the systems: b batch, h query heads, k key/value heads, g query heads of one key/value
head, t queries, s keys, i query blocks, j key blocks, d head_dim.
"""
