"""Array operations of which a platform likes a form of its own.

Each has one plain reference form, and named forms where a platform was measured to prefer another
(docs/performance.md); `platform.by_platform` chooses, `platform.pinned` overrules it. A test holds
all forms to the reference. All work on one image at a time along the leading axis, by stable sorts,
batched gathers and one-hot products: XLA needs no collective for any of them when the batch is
sharded (`lax.top_k` and fancy indexing compile to all-gathers there).
"""
