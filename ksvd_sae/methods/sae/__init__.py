"""SAEs trained beside the dictionaries, and linear encoders fitted to them: SAELens' trainers, only sooner."""
