"""How well models agree with people: statistics, benchmarks of pictures and clips, tables."""
