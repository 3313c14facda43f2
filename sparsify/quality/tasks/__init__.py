"""Tasks of lm-eval (zero-shot and few-shot): which were meant, who answers them, and what the answers are worth."""
