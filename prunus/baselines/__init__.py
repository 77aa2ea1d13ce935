"""Other people's methods, each in one file with the one signature `compress(subject, keep) -> Outcome`.

`table.TABLE` has their names, papers and limits; `table.find(name).run(subject, keep)` runs one.
"""
