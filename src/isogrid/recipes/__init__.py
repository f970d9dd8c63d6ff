"""Recipes: files that name model, data, target, rules, schedule and training; and the runs that they describe."""
