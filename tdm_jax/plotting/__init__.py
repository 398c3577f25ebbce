"""Pictures: curves of results, maps of patches, the page that explores both."""
