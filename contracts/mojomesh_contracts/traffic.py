"""Which entities a challenger scores: an entity has a bucket for ever, and buckets are given to versions.

Registry gives them (`models.traffic`), scorer looks them up. A request without an entity belongs to the champion.
"""

from hashlib import blake2b

BUCKETS = 1000
"""Of each model's entities; so a share is a whole number of thousandths."""


def bucket_of(model: str, entity_id: str) -> int:
    """The entity's bucket; another one for every model, so that it is not always the same entities that are experimented on."""
    return int.from_bytes(blake2b(f"{model}/{entity_id}".encode(), digest_size=8).digest(), "big") % BUCKETS
