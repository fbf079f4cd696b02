"""One model being served: its driver, pages, scheduler and token histories, behind typed messages."""
