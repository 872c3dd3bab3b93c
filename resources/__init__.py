"""What a run borrows: worlds and their models, the snapshot store, the tracker, the value store."""
