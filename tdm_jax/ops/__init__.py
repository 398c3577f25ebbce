"""Array operations of which a platform likes a form of its own.

Each has one plain reference form, and named forms where a platform was measured to prefer another:
a form's docstring says why, and which row of docs/measurements.md measured it. Of them
`platform.by_platform` chooses, `platform.pinned` overrules it, and a test holds all to the
reference. All work on one image at a time along the leading axis, by stable sorts, batched gathers
and one-hot products: XLA needs no collective for any of them when the batch is sharded (`lax.top_k`
and fancy indexing compile to all-gathers there).
"""
