"""Models, data, trainers and slow, obvious references that several tests share."""
