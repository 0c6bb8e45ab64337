"""Verifiers of generated text by name: answers, code, length, language, repetition, and a user's own functions."""
