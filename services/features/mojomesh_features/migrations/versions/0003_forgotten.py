"""Receipts whose person was forgotten: the id stays, so that a repeat does not bring the rest back."""

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add when."""
    op.execute("ALTER TABLE features.predictions ADD COLUMN forgotten_at timestamptz")


def downgrade() -> None:
    """Refuse: an empty receipt would look like a whole one."""
    raise NotImplementedError("receipts may have been emptied; drop the column by hand if you mean it")
