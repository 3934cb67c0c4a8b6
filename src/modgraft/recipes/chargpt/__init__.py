"""A character GPT, naive and fast, beside what counting characters gives."""
