"""Which weights die: saliency, budgets, schedules, masks. Needs torch only."""
