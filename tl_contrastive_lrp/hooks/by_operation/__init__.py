"""Rules for single operations inside wrapped modules that no HookPoint reaches."""
