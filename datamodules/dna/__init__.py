"""DNA: genomes from FASTA or GenBank, as windows of token ids."""
