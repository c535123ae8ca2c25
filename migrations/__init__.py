"""Alembic migrations: `skipline migrate` brings the database to the newest schema."""
