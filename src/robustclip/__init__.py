"""Robust CLIP, Reproduced: the attack, training and defense code behind the book."""
