"""Distillation by data: a teacher's samples, verified, written as chats for supervised fine-tuning."""
