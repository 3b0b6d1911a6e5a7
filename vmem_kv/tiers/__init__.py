"""Where sequences go that lose their slot: host memory, then disk, then files that outlive the process.

memory     host memory in frames, with a budget
moving     copies that run while the caller goes on, and who launches them
copies     the rows of one sequence outside of its slot
host       the second tier: park and restore
streams    rows in files, plane after plane, with a checksum for each
disk       the third tier: one unnamed file
files      save and load, checked before anything is used
sessions   sequences that are kept by name, and go down the tiers as time passes
"""
