"""Adapters on disk: folders that go to PEFT and come from there, or under our own names where PEFT has no form."""
