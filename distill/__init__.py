"""Teacher, student, data and training of the dgiqa-stream models. Needs torch."""
