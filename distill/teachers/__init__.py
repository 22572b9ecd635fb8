"""Fitting a teacher: recipes, rated and unrated pictures, losses, commands. Needs torch."""
