"""The chaos harness: real servers and processes, killed at random; a ledger outside the system says what really ran."""
