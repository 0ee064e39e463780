"""The coordinator's durable record (SQLModel)."""
