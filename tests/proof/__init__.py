"""What vmem_kv claims of itself, shown many times. docs/reliability.md says what is shown, and what is not."""
