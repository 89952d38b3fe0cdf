"""Damaged and hostile files, by the hundred: BNFIX_FUZZ_CASES says how many."""
