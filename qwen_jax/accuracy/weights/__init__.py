"""The weights audit: a checkpoint's bytes against the parameters somebody holds."""
