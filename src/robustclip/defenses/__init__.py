"""Defenses at test time: from a classifier to a defended classifier."""
